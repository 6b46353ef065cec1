"""Memory and collectives of a step for language models of 1, 7 and 70 billion parameters on 8 to 512 GPUs.

Arithmetic (``benchmarks/arithmetic.py``), nothing is measured. The tables are those of docs/scale.md.

    python -m benchmarks.scale
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.arithmetic import Collective, Memory, Size, sharded
from benchmarks.needs import Variant, forwards, needs
from composer_sam.markdown import table

__all__ = ['MODELS', 'Decoder', 'memory_tables', 'steps_table']

GIB = 2**30
NODE = 8  # GPUs that share one copy under HSDP
MICRO_BATCHES = 8


@dataclass(frozen=True)
class Decoder:
    """A transformer as LLaMA has it: embedding, blocks and head are units of their own, without biases.

    Args:
        layers: blocks.
        width: of the residual stream.
        hidden: width of the feed-forward network, of three matrices.
        keys: width of the keys, and of the values.
        vocabulary: tokens.
    """

    layers: int
    width: int
    hidden: int
    keys: int
    vocabulary: int = 32_000

    @property
    def block(self) -> int:
        """The elements of a block: queries and output, keys and values, feed-forward, two norms."""
        attention = 2 * self.width * self.width + 2 * self.keys * self.width
        return attention + 3 * self.hidden * self.width + 2 * self.width

    @property
    def units(self) -> list[int]:
        """The elements of every unit; the last norm is in that of the head."""
        embedding = self.vocabulary * self.width
        return [embedding, *[self.block] * self.layers, embedding + self.width]

    @property
    def size(self) -> Size:
        """The sizes in bf16 mixed precision with gradients reduced in fp32."""
        return Size(sum(self.units), 9 * self.layers + 3, len(self.units), 0, width=4, gathered=2)


MODELS = {
    '1B': Decoder(layers=22, width=2048, hidden=5632, keys=256),
    '7B': Decoder(layers=32, width=4096, hidden=11_008, keys=4096),
    '70B': Decoder(layers=80, width=8192, hidden=28_672, keys=1024),
}
# GPUs in all, and those that hold one copy.
LAYOUTS = {
    '8 GPUs': (8, 8),
    '64 GPUs': (64, 64),
    '64 GPUs, HSDP': (64, NODE),
    '512 GPUs': (512, 512),
    '512 GPUs, HSDP': (512, NODE),
}
PLAIN, SAM = Variant('SGD'), Variant('SAM')  # what the base optimizer is makes no difference to collectives


def memory_tables() -> str:
    """Return for every model what a GPU holds and sends, by layout, in GiB."""
    columns = (
        *('', 'weights', 'gradient', "Adam's moments", 'whole units', 'AdamW', 'SAM, between passes'),
        *('SAM, second pass', 'AdamW sends', 'SAM sends', 'of that, to replicas'),
    )
    parts = []
    for name, model in MODELS.items():
        size, unit = model.size, max(model.units)
        rows = []
        for layout, (ranks, shards) in LAYOUTS.items():
            memory = Memory(size.parameters, unit, shards)
            held = (memory.copy, memory.copy, memory.adam, memory.units, memory.plain, memory.ascent)
            plain, sam = (sharded(needs(one), size, ranks, shards) for one in (PLAIN, SAM))
            sent = (_sent(plain), _sent(sam))
            # The sums of norms are all-reduces too, of a few bytes.
            replicas = _gib(_sent([one for one in sam if one.kind == 'all_reduce'])) if ranks > shards else '-'
            rows.append((layout, *map(_gib, (*held, memory.perturbed(), *sent)), replicas))
        heading = (
            f'{size.parameters / 1e9:.2f} billion parameters, {model.layers} blocks of width {model.width}. The '
            f'largest unit has {unit / 1e6:.0f} million, the whole gradient in fp32 {_gib(4 * size.parameters)} GiB.'
        )
        parts.append(f'### {name}\n\n{heading}\n\n{table(columns, rows)}')
    return '\n'.join(parts)


def steps_table() -> str:
    """Return the collectives of an average step, for all models, and the copies of the shard it adds at its peak."""
    models = ' / '.join(MODELS)
    columns = (
        *('step', 'passes', f'all-gathers, {models}', f'reduce-scatters, {models}', 'sums', 'bytes'),
        *('adds copies', 'of these held'),
    )
    return table(columns, _steps())


def _steps() -> Iterator[Sequence[str]]:
    for label, variant, micro_batches, reduces_once in _shown():
        asked, method = needs(variant), variant.method
        gathers, reductions, ratios = [], [], set()
        for model in MODELS.values():
            found = sharded(
                *(asked, model.size, NODE, NODE, forwards(variant, micro_batches)),
                asked.passes if reduces_once else None,
            )
            gathers.append(_number(found, 'all_gather', variant))
            reductions.append(_number(found, 'reduce_scatter', variant))
            plain = _sent(sharded(needs(PLAIN), model.size, NODE, NODE))
            ratios.add(f'{_sent(found) / variant.steps / plain:.3g}x')
        (ratio,) = ratios  # that of the passes, whatever the model
        yield (
            *(label, f'{asked.passes / variant.steps:g}', ' / '.join(gathers), ' / '.join(reductions)),
            *(f'{asked.sums / variant.steps:g}', ratio),
            *(('0', '0') if method is None else (str(method.extra_copies), str(method.held_copies))),
        )


def _number(collectives: Sequence[Collective], kind: str, variant: Variant) -> str:
    return f'{sum(one.number for one in collectives if one.kind == kind) / variant.steps:g}'


def _shown() -> Iterator[tuple[str, Variant, int, bool]]:
    """Return the steps to show: a label, the variant, its micro-batches, and whether they are reduced once."""
    quarter = Variant('SAM', options=(('ascent_fraction', 0.25),))
    yield 'AdamW', PLAIN, 1, False
    yield '`SAM()`', SAM, 1, False
    yield '`SAM(sync_first_pass=True)`', Variant('SAM', options=(('sync_first_pass', True),)), 1, False
    yield '`SAM(ascent_fraction=0.25)`', quarter, 1, False
    yield '`SAM(interval=10)`', Variant('SAM', 10), 1, False
    for name in ('MSAM', 'ASAM', 'FunctionalSAM', 'GSAM', 'LookSAM', 'GAM'):
        yield f'`{name}()`', Variant(name), 1, False
    for label, variant in (('AdamW', PLAIN), ('`SAM()`', SAM), ('`SAM(ascent_fraction=0.25)`', quarter)):
        yield f'{label}, {MICRO_BATCHES} micro-batches', variant, MICRO_BATCHES, False
    yield f'`SAM()`, {MICRO_BATCHES} micro-batches reduced once a pass', SAM, MICRO_BATCHES, True


def _sent(collectives: Sequence[Collective]) -> float:
    return sum(one.traffic for one in collectives)


def _gib(number: float) -> str:
    return f'{number / GIB:.3g}' if number < 100 * GIB else f'{number / GIB:.0f}'


def main() -> None:
    print(f'{memory_tables()}\n{steps_table()}', end='')


if __name__ == '__main__':
    main()

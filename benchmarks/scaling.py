"""Growth of the cost of a sharpness-aware step with model, micro-batches and processes; by arithmetic for more ranks.

Measured: the ratio to the base step as tensors, parameters, micro-batches and gloo processes grow, through Composer's
Trainer on small MLPs; all variants train interleaved, a step each in turn. On paper: collectives and bytes of a step on
up to thousands of ranks, which is arithmetic (``benchmarks/arithmetic.py``) and no measurement. Checked: the same
arithmetic against the collectives that two and four processes really do, and against the memory of two under FSDP2;
where they differ the table says so, and this script exits with 1.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --sections measured --rounds 20
    python -m benchmarks.scaling --sections paper checked --json /tmp/scaling
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.multiprocessing
from torch import nn

from benchmarks.arithmetic import Collective, Size, ddp, sharded
from benchmarks.collectives import STRATEGIES, counted, counted_in_trainer
from benchmarks.measure import interleaved, median, ratios, spread
from benchmarks.needs import METHODS, Needs, Variant, needs
from benchmarks.ranks import on_ranks
from benchmarks.report import Report, Table
from benchmarks.shards import as_predicted, memory_of
from benchmarks.shards import measured as measured_memory
from benchmarks.workloads import Batches, Clock, make_trainer
from composer_sam.recipes.models import mlp

SECTIONS = ('measured', 'paper', 'checked')
SECONDS = 900  # for everything a set of ranks does
BATCH = 64
# Layers and width: the first three have as many parameters in ever more tensors, the last three ever more in as many.
DEPTHS = ((4, 256), (16, 128), (64, 64))
WIDTHS = ((4, 64), (4, 256), (4, 1024))
MICRO_BATCHES = (1, 2, 4, 8)
PROCESSES = (1, 2, 4)
CHECKED_RANKS = (2, 4)
# ResNet-50 as torchvision has it, in one unit per block, stem and head; the others are decoders of 9 tensors a layer.
# In fp32, and DDP's buckets of 25 MiB, but none smaller than a tensor.
MODELS = {
    'ResNet-50': Size(25_557_032, tensors=161, units=18, buckets=5, buffers=(212_480, 424)),
    '1e9': Size(10**9, tensors=219, units=24, buckets=154),
    '7e9': Size(7 * 10**9, tensors=291, units=32, buckets=291),
}
RANKS = (8, 64, 1024, 4096)
NODE = 8  # ranks that share one copy under HSDP
EXAMPLE = ('7e9', 1024)

MEASURED = ('grows', 'layers x width', 'tensors', 'parameters', 'micro-batches', 'processes', 'variant', 'ms per step')
# Two passes, without and with an average of their own, and four; one pass, one with a memory, one or two, three.
CHOSEN = ('SAM', 'WSAM', 'GAM', 'MSAM', 'FriendlySAM', 'LookSAM', 'CRSAM')
ASKED = (
    *('variant', 'passes P', 'averaged by DDP G', 'by the method M', 'sums over shards K', 'numbers in them k'),
    'numbers agreed A',
)
ARITHMETIC = ('model is', 'collective', 'over ranks', 'number', 'bytes of the tensors', 'bytes a rank sends')
CHECKED = ('model is', 'ranks', 'variant', 'steps', 'predicted', 'counted', 'bytes predicted', 'bytes counted', 'equal')
MEMORY = ('variant', 'adds, as stated', 'adds', 'as predicted')
TRAINER = ('ranks', 'variant', 'steps', 'predicted without', 'counted', "Composer's own", 'predicted own', 'equal')


def stack(depth: int, width: int) -> nn.Module:
    return mlp([64, *[width] * (depth + 1), 10])


def on_limited_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    return on_ranks(ranks, function, *arguments, patience=SECONDS / 4, seconds=SECONDS)


# Measured.


def measured(
    variants: dict[str, Variant], depth: int, width: int, micro_batches: int, rounds: int, period: int
) -> list[Any]:
    """For every variant its name, ms per step and ratio to the base step, each with its spread, over ``rounds`` times
    ``period`` steps; on every rank, where there are several."""
    device = torch.device('cpu')
    batches = Batches(BATCH, period, (64,), device)
    clocks, steps = {}, {}
    for name, variant in variants.items():
        clocks[name] = Clock(device)
        trainer = make_trainer(
            stack(depth, width),
            batches,
            variant.algorithms,
            callbacks=[clocks[name]],
            device_train_microbatch_size=BATCH // micro_batches,
        )
        steps[name] = functools.partial(trainer.fit, duration='1ba')
    interleaved(steps, rounds * period, device, warmup=period)
    # The clocks leave out what fit() does before and after the one step.
    means = {
        name: [sum(clock.seconds[i : i + period]) / period for i in range(period, len(clock.seconds), period)]
        for name, clock in clocks.items()
    }
    return [(name, *_figures(own, means['base'])) for name, own in means.items()]


def _figures(own: Sequence[float], base: Sequence[float]) -> tuple[float, ...]:
    of_base = ratios(own, base)
    return 1e3 * median(own), 1e3 * spread(own), median(of_base), spread(of_base)


def add_measured(report: Report, interval: int, rounds: int) -> None:
    chosen = [*map(Variant, CHOSEN), Variant('SAM', interval)]
    variants = {'base': Variant('SGD'), 'base again': Variant('SGD'), **{str(variant): variant for variant in chosen}}
    table = Table(
        'Step time as the model, its micro-batches and the processes grow',
        (*MEASURED, '±', 'x base', '±'),
        note=(
            f'MLPs on batches of {BATCH} per process through the Trainer; a step is timed from BATCH_START to '
            f'BATCH_END. Medians over {rounds} rounds of {interval} steps, ratios to the base steps of the same round; '
            "± is half the interquartile range. 'base again' is a second base trainer: its distance from 1 is the "
            'noise. Where processes grow each has one thread, under DDP over gloo on this one machine: more processes '
            'than cores share these, so that their milliseconds say nothing about scaling. In every step, base or not, '
            "are Composer's own small collectives, which are counted below: they bring ratios nearer to 1."
        ),
    )
    cases = [
        *(('tensors', *shape, 1, None) for shape in DEPTHS),
        *(('parameters', *shape, 1, None) for shape in WIDTHS),
        *(('micro-batches', *DEPTHS[0], count, None) for count in MICRO_BATCHES),
        *(('processes', *DEPTHS[0], 1, count) for count in PROCESSES),
    ]
    for grows, depth, width, micro_batches, processes in cases:
        arguments = (variants, depth, width, micro_batches, rounds, interval)
        key = f'{depth} layers of {width}, {micro_batches} micro-batches'  # a case of two sweeps is measured once
        if processes is None:
            rows = report.case(key, functools.partial(measured, *arguments))
        else:
            key += f', {processes} processes'
            rows = report.case(key, functools.partial(on_limited_ranks, processes, measured, *arguments))
        parameters = list(stack(depth, width).parameters())
        size = len(parameters), sum(p.numel() for p in parameters)
        for row in rows:
            table.add(grows, f'{depth} x {width}', *size, micro_batches, processes or 1, *row)
    report.add(table)


# On paper.


def all_variants(interval: int) -> list[Variant]:
    """Return the base step, every method at every step, and every method at every ``interval``-th step."""
    return [Variant('SGD'), *map(Variant, METHODS), *(Variant(name, interval) for name in METHODS)]


def layouts(asked: Needs, size: Size, ranks: int) -> dict[str, list[Collective]]:
    """Return the collectives of a method by the distribution of the model over the ranks."""
    return {
        'DDP': ddp(asked, size, ranks),
        'FSDP': sharded(asked, size, ranks, ranks),
        f'HSDP, {NODE} shards': sharded(asked, size, ranks, NODE),
    }


def sent(variant: Variant, size: Size, ranks: int, layout: str) -> float | None:
    """Return the bytes a rank sends in an average step, None where the method does not support the layout."""
    if layout != 'DDP' and not variant.shardable:
        return None
    return sum(one.traffic for one in layouts(needs(variant), size, ranks)[layout]) / variant.steps


def asked_table(variants: Sequence[Variant]) -> Table:
    table = Table(
        'What a step asks of the ranks',
        ASKED,
        note=(
            'Average step, noted on the rules as they run on the engine. Of its P gradients DDP averages G, the method '
            'averages M vectors itself, and the rest stays on its rank. FSDP averages all P, and leaves nothing to the '
            'method; only shards need sums of numbers over the ranks, for norms and inner products, and only replicas '
            'numbers on which they agree, to decide alike. LookSAM has all passes in every k-th of the steps that it '
            'perturbs, here the fifth. In AESAM the gradients decide, in RandomSAM a random number: their average step '
            'lies between both cases; with one pass RandomSAM asks what SGD does. MSAM needs a second sum if the base '
            'optimizer adds weight decay to the gradient, as SGD can.'
        ),
    )
    for variant in variants:
        of = needs(variant)
        figures = (of.passes, of.reduced, of.means, of.sums, of.summed, of.agreed)
        table.add(str(variant), *(figure / variant.steps for figure in figures))
    return table


def arithmetic_table() -> Table:
    table = Table(
        'The arithmetic',
        ARITHMETIC,
        note=(
            'In an average step: P, G, M, K, k, A as above; N parameters of b bytes in T tensors; n ranks, s of them '
            'hold one copy (FSDP: s = n); B buckets; u wrapped units, each gathered for the forward and again for the '
            'backward (a root with parameters of its own only once); buffers of t data types and β bytes. The ring '
            'algorithm sends (n-1)/n of a tensor to gather it, as much to reduce and scatter it, and both to reduce it '
            'for all.'
        ),
    )
    table.add('DDP', 'all_reduce', 'n', 'G B + M + A', '(G N + M (N + T)) b + 4 A', '2 (n-1)/n of them')
    table.add('DDP', 'broadcast', 'n', 't', 'β', 'all')
    table.add('FSDP, HSDP', 'all_gather', 's', '2 P u', '2 P N b', '(s-1)/s of them')
    table.add('FSDP, HSDP', 'reduce_scatter', 's', 'P u', 'P N b', '(s-1)/s of them')
    table.add('FSDP, HSDP', 'all_reduce', 's', 'K', '4 k', '2 (s-1)/s of them')
    table.add('HSDP', 'all_reduce', 'n/s', 'P u', 'P N b / s', '2 (n/s-1)/(n/s) of them')
    return table


def example_table(variants: Sequence[Variant]) -> Table:
    name, ranks = EXAMPLE
    size = MODELS[name]
    kinds = ('all_reduce', 'all_gather', 'reduce_scatter')
    table = Table(
        f'On paper: an average step of {name} parameters on {ranks} ranks',
        ('model is', 'variant', *kinds, *(f'{kind} GB' for kind in kinds), 'a rank sends GB', 'x SGD'),
        note=f'Arithmetic, not measured: T = {size.tensors}, u = {size.units}, B = {size.buckets}, b = {size.width}.',
    )
    for layout in layouts(Needs(), size, ranks):
        for variant in variants:
            traffic, base = (sent(one, size, ranks, layout) for one in (variant, variants[0]))
            if traffic is None or base is None:
                continue
            collectives = layouts(needs(variant), size, ranks)[layout]
            of = [[one for one in collectives if one.kind == kind] for kind in kinds]
            numbers = [sum(one.number for one in own) / variant.steps for own in of]
            volumes = [sum(one.bytes for one in own) / variant.steps / 1e9 for own in of]
            table.add(layout, str(variant), *numbers, *volumes, traffic / 1e9, traffic / base)
    return table


def traffic_table(variants: Sequence[Variant]) -> Table:
    shown = [variant for variant in variants if variant.interval == 1 or variant.name == 'SAM']
    models = [
        f'{name}: N = {m.parameters}, T = {m.tensors}, u = {m.units}, B = {m.buckets}' for name, m in MODELS.items()
    ]
    table = Table(
        'On paper: GB that a rank sends in an average step',
        ('model', 'ranks', 'model is', *map(str, shown)),
        note=f'Arithmetic, not measured, b = 4. {"; ".join(models)}. None: FSDP refuses the method.',
    )
    for name, size in MODELS.items():
        for ranks in RANKS:
            for layout in layouts(Needs(), size, ranks):
                traffic = [sent(variant, size, ranks, layout) for variant in shown]
                table.add(name, ranks, layout, *(None if of is None else of / 1e9 for of in traffic))
    return table


# Checked.


def checks(variants: Sequence[Variant], ranks: int) -> list[Any]:
    """Return predicted and counted collectives by strategy and supported variant; called on every rank."""
    found = [
        (strategy, index, counted(strategy, variant))
        for strategy, how in STRATEGIES.items()
        for index, variant in enumerate(variants)
        if ranks >= how.fewest and (how.shards is None or variant.shardable)
    ]
    return found + [('Trainer', index, counted_in_trainer(variant)) for index, variant in enumerate(variants)]


def memories(variants: Sequence[Variant]) -> list[Any]:
    """Return what a rank of FSDP2 holds in the steps of every supported variant; called on every rank."""
    return [
        (index, measured_memory(variant))
        for index, variant in enumerate(variants)
        if variant.shardable and variant.interval == 1
    ]


def add_checked(report: Report, variants: Sequence[Variant]) -> bool:
    """Add the tables of the checks, and return whether all counts are as predicted."""
    engine = Table(
        'Checked: predicted and counted collectives',
        (*CHECKED, 'kinds'),
        note=(
            'Gloo on the CPU, the engine in a loop of its own on an MLP of four units; counted where torch hands '
            'collectives to the process group, which the C++ of DistributedDataParallel does too. Sums over so many '
            'steps. Equal: number, bytes and ranks of every kind, on every rank. Under DDP the model has a BatchNorm, '
            'whose buffers are handed out. bf16: units are gathered in it, gradients reduced in fp32. fp16: gradients '
            'are reduced in it, because FSDP2 then adds them up: gloo has no average. Nor have streams on the CPU '
            'events, which a hybrid mesh of FSDP2 asks for: here they do.'
        ),
    )
    trainer = Table(
        "Checked: Composer's own collectives",
        TRAINER,
        note=(
            'The same under DDP through the Trainer, between BATCH_START and BATCH_END. Composer has collectives of a '
            'few bytes each for losses, counts and train metrics; of these every further pass may add one, the sum of '
            "the batch's samples. Predicted are the base step's own and these."
        ),
    )
    for ranks in CHECKED_RANKS:
        plain = 0
        run = functools.partial(on_limited_ranks, ranks, checks, variants, ranks)
        for strategy, index, of in report.case(f'collectives of {ranks} processes', run):
            variant = variants[index]
            predicted, found = ([Collective(**one) for one in of[side]] for side in ('predicted', 'counted'))
            numbers = [sum(one.number for one in side) for side in (predicted, found)]
            volumes = [sum(one.bytes for one in side) for side in (predicted, found)]
            if strategy == 'Trainer':
                own = numbers[1] - numbers[0]
                plain = own if index == 0 else plain
                own_predicted = plain * variant.steps + needs(variant).passes - variant.steps
                figures = (*numbers, own, own_predicted, own == own_predicted and of['ranks alike'])
                trainer.add(ranks, str(variant), variant.steps, *figures)
            else:
                equal = predicted == found and of['ranks alike']
                kinds = _kinds(found) if equal else f'{_kinds(found)} instead of {_kinds(predicted)}'
                engine.add(strategy, ranks, str(variant), variant.steps, *numbers, *volumes, equal, kinds)
    memory = Table(
        'Checked: the memory of a rank under FSDP2',
        MEMORY,
        note=(
            'Two gloo ranks, AdamW, fp32 weights, units gathered in bf16 and reduced in fp32, two micro-batches. The '
            'most bytes that all tensors have together, in the passes and between them, beyond the peak predicted for '
            'AdamW alone, in copies of the shard. What a method states is an upper bound.'
        ),
    )
    run = functools.partial(on_limited_ranks, 2, memories, variants)
    for index, found in report.case('memory of 2 processes', run):
        variant, predicted = variants[index], memory_of(found)
        added = (max(found['peaks'].values()) - predicted.plain) / predicted.copy
        stated = 0 if variant.method is None else variant.method.extra_copies
        memory.add(str(variant), stated, added, as_predicted(variant, found))
    for table in (engine, trainer, memory):
        report.add(table)
    return all(row[table.columns.index('equal')] for table in (engine, trainer) for row in table.rows) and all(
        row[-1] for row in memory.rows
    )


def _kinds(collectives: Sequence[Collective]) -> str:
    return ', '.join(f'{one.number} {one.kind} over {one.ranks}' for one in collectives)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sections', nargs='+', default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument('--interval', type=int, default=10)
    parser.add_argument('--rounds', type=int, default=6, help='of INTERVAL measured steps, after one uncounted')
    parser.add_argument('--threads', type=int, default=1, help='where there is one process; ranks have one each')
    parser.add_argument('--json', metavar='OUT', help='write the report here instead of benchmarks/results/')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    report = Report('scaling', vars(options), options.json)
    variants = all_variants(options.interval)
    as_predicted = True
    if 'measured' in options.sections:
        add_measured(report, options.interval, options.rounds)
    if 'paper' in options.sections:
        for table in (asked_table(variants), arithmetic_table(), example_table(variants), traffic_table(variants)):
            report.add(table)
    if 'checked' in options.sections:
        as_predicted = add_checked(report, variants)
    report.write()
    if not as_predicted:
        sys.exit('the collectives that were counted are not those predicted: see the rows that are not equal')


if __name__ == '__main__':
    main()

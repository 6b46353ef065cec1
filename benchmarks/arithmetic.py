"""The arithmetic of a step on many ranks: its collectives, and the memory of a rank under FSDP2.

Nothing here is measured. ``benchmarks/collectives.py`` counts the collectives of real ranks, ``benchmarks/shards.py``
measures their memory, and ``benchmarks/scaling.py`` and ``tests/distributed/test_scale.py`` compare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.needs import Needs

__all__ = ['Collective', 'Memory', 'Size', 'ddp', 'merged', 'sharded']


@dataclass(frozen=True)
class Size:
    """The sizes of a model that its collectives depend on.

    Args:
        parameters: elements.
        tensors: parameter tensors.
        units: modules that FSDP wraps, each of which is gathered by itself.
        buckets: in which DistributedDataParallel reduces the gradient.
        buffers: bytes of buffers by data type, which DistributedDataParallel hands out once a step.
        width: bytes per element where gradients are reduced.
        gathered: bytes per element where FSDP gathers parameters.
    """

    parameters: int
    tensors: int
    units: int
    buckets: int
    buffers: tuple[int, ...] = ()
    width: int = 4
    gathered: int = 4


@dataclass(frozen=True, order=True)
class Collective:
    """Collectives of one kind over the same number of ranks.

    Args:
        kind: ``'all_reduce'``, ``'all_gather'``, ``'reduce_scatter'`` or ``'broadcast'``.
        ranks: that take part in each.
        number: how many there are.
        bytes: of the whole tensors, together: what is reduced, or what is gathered in the end.
    """

    kind: str
    ranks: int
    number: int
    bytes: int

    @property
    def traffic(self) -> float:
        """The bytes every rank sends in the ring algorithm; in a broadcast along the ring every rank but the last."""
        if self.kind == 'broadcast':
            return self.bytes
        return (2 if self.kind == 'all_reduce' else 1) * (self.ranks - 1) / self.ranks * self.bytes


def ddp(needs: Needs, size: Size, ranks: int) -> list[Collective]:
    """Return the collectives under DistributedDataParallel.

    A gradient is reduced in buckets. A mean is reduced in one piece, in which each tensor has one more element that
    says whether a rank had it. Every rank computes its own norms. The numbers that are agreed on are of fp32.
    """
    gradients = needs.reduced * size.parameters + needs.means * (size.parameters + size.tensors)
    number = needs.reduced * size.buckets + needs.means
    return merged(
        [
            Collective('all_reduce', ranks, number, gradients * size.width),
            Collective('all_reduce', ranks, needs.agreed, 4 * needs.agreed),
            Collective('broadcast', ranks, needs.steps * len(size.buffers), needs.steps * sum(size.buffers)),
        ]
    )


def sharded(
    needs: Needs, size: Size, ranks: int, shards: int, forwards: int | None = None, reductions: int | None = None
) -> list[Collective]:
    """Return the collectives under FSDP over ``shards`` ranks, with ``ranks / shards`` replicas (hybrid if several).

    Every pass over a micro-batch gathers each unit for the forward and again for the backward, and reduces and scatters
    its gradient; the replicas then reduce the shards. What is summed over shards are fp32 numbers.

    Args:
        needs: what the method asks for.
        size: the model's.
        ranks: all of them.
        shards: ranks that hold one copy of the model together.
        forwards: passes over micro-batches; None: a pass sees its batch at once.
        reductions: those of them after which the gradient is reduced; None: all.
    """
    forwards = needs.passes if forwards is None else forwards
    reductions = forwards if reductions is None else reductions
    reduced = reductions * size.parameters * size.width
    replicas = ranks // shards
    between = [Collective('all_reduce', replicas, reductions * size.units, reduced // shards)] if replicas > 1 else []
    return merged(
        [
            Collective('all_gather', shards, 2 * forwards * size.units, 2 * forwards * size.parameters * size.gathered),
            Collective('reduce_scatter', shards, reductions * size.units, reduced),
            Collective('all_reduce', shards, needs.sums, 4 * needs.summed),
            *between,
        ]
    )


def merged(collectives: Iterable[Collective]) -> list[Collective]:
    """Add up the collectives of each kind and number of ranks."""
    numbers, volumes = Counter(), Counter()
    for one in collectives:
        numbers[one.kind, one.ranks] += one.number
        volumes[one.kind, one.ranks] += one.bytes
    return sorted(Collective(key[0], key[1], number, volumes[key]) for key, number in numbers.items() if number)


@dataclass(frozen=True)
class Memory:
    """The bytes of tensors on a rank under FSDP2: fp32 weights and AdamW, units gathered in bf16, gradients reduced in
    fp32. Activations, the temporaries of the base optimizer's step and free memory of the allocator are not included.

    Args:
        parameters: elements of the model.
        unit: elements of its largest unit.
        shards: ranks that hold one copy of the model together.
    """

    parameters: int
    unit: int
    shards: int

    @property
    def copy(self) -> float:
        """The rank's shard of one copy of the weights, or of the gradient."""
        return 4 * self.parameters / self.shards

    @property
    def adam(self) -> float:
        """Adam's two moments."""
        return 2 * self.copy

    @property
    def units(self) -> int:
        """What a backward has of whole units: one that it is in, the next one being gathered, the first one's gradient
        (bf16 all three), and the buffer in which the gradient of the one before is reduced (fp32)."""
        return (2 + 2 + 2 + 4) * self.unit

    @property
    def plain(self) -> float:
        """The peak of a pass at w: weights, Adam's moments, gradient, units."""
        return self.copy + self.adam + self.copy + self.units

    @property
    def ascent(self) -> float:
        """The peak between the passes of SAM: weights, Adam's moments, the copy of w, and the offset in the memory of
        the first gradient. No unit is whole."""
        return self.copy + self.adam + 2 * self.copy

    def perturbed(self, copies: int = 1) -> float:
        """Return the peak of a step that adds so many copies: for SAM that of w, during the second pass."""
        return self.plain + copies * self.copy

    @property
    def accumulated(self) -> float:
        """What a pass adds if FSDP2 reduces the gradient after its last micro-batch only: the whole gradient in fp32,
        on every rank, where its shard was."""
        return 4 * self.parameters - self.copy

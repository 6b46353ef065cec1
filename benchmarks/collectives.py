"""The collectives of a step: predicted by arithmetic, and counted on real ranks.

:func:`ddp` and :func:`sharded` are arithmetic: they compute the collectives of what a method requests
(``benchmarks/needs.py``) for any model and any number of ranks. :func:`counted` runs the same step on gloo processes
and counts the collectives that reach torch's dispatcher, from Python and from the C++ code of
DistributedDataParallel. ``benchmarks/scaling.py`` compares the two.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from composer import Callback, Event, Logger, State
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.needs import Needs, Variant, needs
from benchmarks.workloads import Batches, make_trainer
from composer_sam import SharpnessAwareOptimizer

__all__ = [
    'STRATEGIES',
    'Collective',
    'Size',
    'counted',
    'counted_in_trainer',
    'ddp',
    'sharded',
]

warnings.filterwarnings('ignore', message=r'Using backward\(\) with create_graph')  # the step releases the graph


# Predicted by arithmetic.


@dataclass(frozen=True)
class Size:
    """The sizes of a model that its collectives depend on.

    Args:
        parameters: elements.
        tensors: parameter tensors.
        units: modules that FSDP wraps, each of which is gathered by itself.
        buckets: in which DistributedDataParallel reduces the gradient.
        buffers: bytes of buffers by data type, which DistributedDataParallel hands out once a step.
        width: bytes per element of parameters and gradients.
    """

    parameters: int
    tensors: int
    units: int
    buckets: int
    buffers: tuple[int, ...] = ()
    width: int = 4


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
    return _merged(
        [
            Collective('all_reduce', ranks, number, gradients * size.width),
            Collective('all_reduce', ranks, needs.agreed, 4 * needs.agreed),
            Collective('broadcast', ranks, needs.steps * len(size.buffers), needs.steps * sum(size.buffers)),
        ]
    )


def sharded(needs: Needs, size: Size, ranks: int, shards: int) -> list[Collective]:
    """Return the collectives under FSDP over ``shards`` ranks, with ``ranks / shards`` replicas (hybrid if several).

    Every pass gathers each unit for the forward and again for the backward, and reduces and scatters its gradient; the
    replicas then reduce the shards. What is summed over shards are fp32 numbers.
    """
    units, whole = needs.passes * size.units, needs.passes * size.parameters * size.width
    replicas = ranks // shards
    between = [Collective('all_reduce', replicas, units, whole // shards)] if replicas > 1 else []
    return _merged(
        [
            Collective('all_gather', shards, 2 * units, 2 * whole),
            Collective('reduce_scatter', shards, units, whole),
            Collective('all_reduce', shards, needs.sums, 4 * needs.summed),
            *between,
        ]
    )


def _merged(collectives: Iterable[Collective]) -> list[Collective]:
    """Add up the collectives of each kind and number of ranks."""
    numbers, volumes = Counter(), Counter()
    for one in collectives:
        numbers[one.kind, one.ranks] += one.number
        volumes[one.kind, one.ranks] += one.bytes
    return sorted(Collective(key[0], key[1], number, volumes[key]) for key, number in numbers.items() if number)


# Counted on real ranks.


_KINDS = {
    'allreduce_': 'all_reduce',
    'allgather_': 'all_gather',
    '_allgather_base_': 'all_gather',
    '_reduce_scatter_base_': 'reduce_scatter',
    'broadcast_': 'broadcast',
}


class _Counting(TorchDispatchMode):
    """Records every collective that is dispatched in its context; on the CPU also those of a backward."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[Collective] = []

    @property
    def found(self) -> list[Collective]:
        return _merged(self._seen)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == 'c10d':
            names = [argument.name for argument in func._schema.arguments]
            group = dist.ProcessGroup.unbox(args[names.index('process_group')])
            # Of output and input the larger one is the whole tensor.
            size = max(_bytes(argument) for argument in args[:2])
            name = str(func._opname)
            self._seen.append(Collective(_KINDS.get(name, name), group.size(), 1, size))
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))


def _ddp(network: nn.Module) -> nn.Module:
    return DistributedDataParallel(network, bucket_cap_mb=0.25)  # pyright: ignore[reportArgumentType]


def _fsdp1(network: nn.Module, hybrid: bool = False) -> nn.Module:
    names = ('replicas', 'shards')
    return FullyShardedDataParallel(
        network,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD if hybrid else ShardingStrategy.FULL_SHARD,
        device_mesh=init_device_mesh('cpu', (dist.get_world_size() // 2, 2), mesh_dim_names=names) if hybrid else None,
        use_orig_params=True,
        device_id=torch.device('cpu'),
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
    )


def _fsdp2(network: Any) -> Any:
    for module in network:
        if isinstance(module, nn.Linear):
            fully_shard(module)
    return fully_shard(network)


# How a network is wrapped, over how many of all ranks it is sharded (None: each has it whole), and the fewest ranks.
STRATEGIES: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[int], int] | None, int]] = {
    'DDP': (_ddp, None, 2),
    'FSDP1': (_fsdp1, lambda ranks: ranks, 2),
    'FSDP2': (_fsdp2, lambda ranks: ranks, 2),
    'FSDP1 hybrid, 2 shards': (functools.partial(_fsdp1, hybrid=True), lambda ranks: 2, 4),
}


def _network(whole: bool) -> nn.Sequential:
    """Return an MLP, for replicas with buffers to broadcast, for shards of layers that divide without padding."""
    hidden = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    head = [nn.BatchNorm1d(256), nn.Linear(256, 10)] if whole else [nn.Linear(256, 16)]
    return nn.Sequential(*hidden, *head)


def _size(network: nn.Module) -> Size:
    parameters = list(network.parameters())
    buffers = Counter()
    for buffer in network.buffers():
        buffers[buffer.dtype] += buffer.nbytes
    units = sum(isinstance(module, nn.Linear) for module in network.modules())
    return Size(sum(p.numel() for p in parameters), len(parameters), units, 0, tuple(buffers.values()))


def _with_buckets(size: Size, model: Any) -> Size:
    """Take the number of buckets from DistributedDataParallel; it is not used if no gradient was reduced."""
    return replace(size, buckets=len(model._get_ddp_logging_data().get('rebuilt_bucket_sizes', '').split(',')))


def counted(strategy: str, variant: Variant) -> dict[str, Any]:
    """Return the counted and the predicted collectives of the variant's steps; called on every rank."""
    wrap, shards, _ = STRATEGIES[strategy]
    ranks, method = dist.get_world_size(), variant.method
    network = _network(whole=shards is None)
    size = _size(network)
    model = wrap(network)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if method is not None:
        optimizer = SharpnessAwareOptimizer(optimizer, method, model)
    x = torch.randn(8, 64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward(create_graph=method is not None and method.backwards_create_graph)
        return loss

    for _ in range(variant.warmup):
        optimizer.step(closure)
    with _Counting() as counting:
        for _ in range(variant.steps):
            optimizer.step(closure)
    asked = needs(variant)
    if shards is None:
        return _beside(ddp(asked, _with_buckets(size, model), ranks), counting)
    return _beside(sharded(asked, size, ranks, shards(ranks)), counting)


class _Batchwise(Callback):
    """Counts between BATCH_START and BATCH_END."""

    def __init__(self) -> None:
        self.counting = _Counting()

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        del state, logger
        if event == Event.BATCH_START:
            self.counting.__enter__()
        elif event == Event.BATCH_END:
            self.counting.__exit__(None, None, None)


def counted_in_trainer(variant: Variant) -> dict[str, Any]:
    """Return the same through Composer's Trainer under DistributedDataParallel; called on every rank.

    The prediction leaves out the trainer's own collectives.
    """
    network, batches = _network(whole=True), Batches(8, variant.steps, (64,), torch.device('cpu'))
    size = _size(network)
    trainer = make_trainer(network, batches, variant.algorithms)
    trainer.fit(duration=f'{variant.warmup}ba')
    counter = _Batchwise()
    trainer.state.callbacks.append(counter)
    trainer.fit(duration=f'{variant.steps}ba')
    size = _with_buckets(size, trainer.state.model)
    return _beside(ddp(needs(variant), size, dist.get_world_size()), counter.counting)


def _beside(predicted: list[Collective], counting: _Counting) -> dict[str, Any]:
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, counting.found)
    return {
        'predicted': [asdict(one) for one in predicted],
        'counted': [asdict(one) for one in counting.found],
        'ranks alike': all(found == counting.found for found in of_ranks),
    }

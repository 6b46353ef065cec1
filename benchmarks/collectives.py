"""The collectives of a step, counted on real ranks, beside those that ``benchmarks/arithmetic.py`` predicts.

:func:`counted` runs the step on gloo processes and counts the collectives that reach torch's dispatcher, from Python
and from the C++ code of DistributedDataParallel. ``benchmarks/scaling.py`` compares the two.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from composer import Callback, Event, Logger, State
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.arithmetic import Collective, Size, ddp, merged, sharded
from benchmarks.needs import Variant, forwards, needs
from benchmarks.workloads import Batches, make_trainer
from composer_sam import SharpnessAwareOptimizer
from composer_sam.engine.pass_number import PassNumber

__all__ = [
    'STRATEGIES',
    'Strategy',
    'counted',
    'counted_in_trainer',
]

warnings.filterwarnings('ignore', message=r'Using backward\(\) with create_graph')  # the step releases the graph


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
        return merged(self._seen)

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


def _hybrid_mesh() -> DeviceMesh:
    return init_device_mesh('cpu', (dist.get_world_size() // 2, 2), mesh_dim_names=('replicas', 'shards'))


def _fsdp1(network: nn.Module, hybrid: bool = False) -> nn.Module:
    return FullyShardedDataParallel(
        network,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD if hybrid else ShardingStrategy.FULL_SHARD,
        device_mesh=_hybrid_mesh() if hybrid else None,
        use_orig_params=True,
        device_id=torch.device('cpu'),
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
    )


def _fsdp2(network: Any, mixed: MixedPrecisionPolicy | None = None, hybrid: bool = False) -> Any:
    options: dict[str, Any] = {'mesh': _hybrid_mesh() if hybrid else None}
    if mixed is not None:
        options['mp_policy'] = mixed
    for module in network:
        if isinstance(module, nn.Linear):
            fully_shard(module, **options)
    return fully_shard(network, **options)


@dataclass(frozen=True)
class Strategy:
    """A distribution of a network over ranks.

    Args:
        wrap: wraps the network.
        shards: over how many of all ranks it is sharded; None: each has it whole.
        fewest: the fewest ranks that it needs.
        gathered: bytes per element where parameters are gathered.
        width: bytes per element where gradients are reduced.
    """

    wrap: Callable[[nn.Module], Any]
    shards: Callable[[int], int] | None
    fewest: int = 2
    gathered: int = 4
    width: int = 4


_MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# FSDP2 averages over replicas, which gloo cannot, but for fp16, whose gradients it divides and adds up.
_HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float16)
STRATEGIES = {
    'DDP': Strategy(_ddp, None),
    'FSDP1': Strategy(_fsdp1, lambda ranks: ranks),
    'FSDP2': Strategy(_fsdp2, lambda ranks: ranks),
    'FSDP2, bf16': Strategy(functools.partial(_fsdp2, mixed=_MIXED), lambda ranks: ranks, gathered=2),
    'FSDP1 hybrid, 2 shards': Strategy(functools.partial(_fsdp1, hybrid=True), lambda ranks: 2, 4),
    'FSDP2 hybrid, 2 shards, fp16': Strategy(
        functools.partial(_fsdp2, mixed=_HALF, hybrid=True), lambda ranks: 2, 4, gathered=2, width=2
    ),
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


def counted(strategy: str, variant: Variant, micro_batches: int = 1, reduces_once: bool = False) -> dict[str, Any]:
    """Return the counted and the predicted collectives of the variant's steps; called on every rank.

    Args:
        strategy: by its name in ``STRATEGIES``.
        variant: the method.
        micro_batches: how many a batch is cut into; under FSDP only.
        reduces_once: whether a pass reduces the gradient after its last micro-batch only; under FSDP2 only.
    """
    how = STRATEGIES[strategy]
    ranks, method = dist.get_world_size(), variant.method
    network = _network(whole=how.shards is None)
    size = replace(_size(network), gathered=how.gathered, width=how.width)
    model = how.wrap(network)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(8, 64)

    def evaluate(number: PassNumber) -> Tensor:
        optimizer.zero_grad()
        losses: list[Tensor] = []
        parts = number.part(x).split(len(x) // micro_batches)
        for index, part in enumerate(parts, 1):
            if reduces_once:
                model.set_requires_gradient_sync(index == len(parts))
            losses.append(model(part).square().mean())
            losses[-1].backward(create_graph=method is not None and method.backwards_create_graph)
        return torch.stack(losses).mean()

    closure: Callable[..., Tensor] = evaluate
    if method is None:
        closure = functools.partial(evaluate, PassNumber(0))
    else:
        optimizer = SharpnessAwareOptimizer(optimizer, method, model)
    # The streams of torch's CPU return no events, without which FSDP2 refuses a hybrid mesh.
    with mock.patch.object(torch.cpu.Stream, 'record_event', torch.cpu.Event):
        for _ in range(variant.warmup):
            optimizer.step(closure)
        with _Counting() as counting:
            for _ in range(variant.steps):
                optimizer.step(closure)
    asked = needs(variant)
    if how.shards is None:
        return _beside(ddp(asked, _with_buckets(size, model), ranks), counting)
    reductions = asked.passes if reduces_once else None
    predicted = sharded(asked, size, ranks, how.shards(ranks), forwards(variant, micro_batches), reductions)
    return _beside(predicted, counting)


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

"""The small regression all ranks train, and the same training written out in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from ranks import gathered
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from composer_sam import SharpnessAwareOptimizer, registry
from tests.problems import made

__all__ = [
    'METHODS',
    'ONCE_DIFFERENTIATED',
    'STEPS',
    'SYNCHRONISED',
    'Fault',
    'Network',
    'assert_ranks_equal',
    'base_of',
    'batches',
    'bits',
    'by_passes',
    'closure_for',
    'counted_reductions',
    'flat',
    'loss_of',
    'sam_by_hand',
    'train',
    'union',
]

STEPS = 20
METHODS = list(registry)
ONCE_DIFFERENTIATED = [name for name in METHODS if not made(name).backwards_create_graph]
# Of several passes, so that a first one can be synchronised or not.
SYNCHRONISED = [name for name in METHODS if made(name).passes > 1]
Batch = tuple[Tensor, Tensor]


class Fault(nn.Module):
    """Identity that raises, once, in its ``at``-th forward or backward counted from when it was armed."""

    def __init__(self) -> None:
        super().__init__()
        # Of a class that is not put back between passes, as numbers, lists and dictionaries are.
        self.remaining = SimpleNamespace(forward=0, backward=0)

    def arm(self, where: str, at: int) -> None:
        setattr(self.remaining, where, at)

    def _count(self, where: str) -> None:
        setattr(self.remaining, where, getattr(self.remaining, where) - 1)
        if getattr(self.remaining, where) == 0:
            raise RuntimeError(f'injected in {where}')

    def forward(self, x: Tensor) -> Tensor:
        self._count('forward')
        if x.requires_grad:
            x.register_hook(lambda grad: self._count('backward'))
        return x


class Network(nn.Module):
    """Layers whose sizes two ranks cannot halve: 7 and 5 rows, and one row, which leaves a rank without any."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first = nn.Linear(6, 7, dtype=dtype)
            self.second = nn.Linear(7, 5, dtype=dtype)
            self.last = nn.Linear(5, 1, dtype=dtype)
        self.fault = Fault()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = self.fault(torch.tanh(self.second(x)))
        return self.last(x)


def batches(rank: int, steps: int = STEPS, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """A rank's own data: every rank has the same number of samples per batch, all different."""
    generator = torch.Generator().manual_seed(100 + rank)
    return [
        (torch.randn(4, 6, generator=generator, dtype=dtype), torch.randn(4, 1, generator=generator, dtype=dtype))
        for _ in range(steps)
    ]


def union(steps: int = STEPS, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """For every step the batches of all ranks as one."""
    by_rank = [batches(rank, steps, dtype) for rank in range(dist.get_world_size())]
    return [
        (torch.cat([x for x, _ in of_step]), torch.cat([y for _, y in of_step]))
        for of_step in zip(*by_rank, strict=True)
    ]


def closure_for(optimizer: SharpnessAwareOptimizer, model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        loss.backward(create_graph=optimizer.method.backwards_create_graph)
        return loss

    return closure


def train(
    model: nn.Module,
    method: Any,
    data: Iterable[Batch],
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    **settings: Any,
) -> SharpnessAwareOptimizer:
    """Step ``model`` through ``data`` and return the optimizer."""
    settings = settings or {'lr': 0.1, 'momentum': 0.9, 'weight_decay': 1e-2}
    wrapper = SharpnessAwareOptimizer(optimizer(model.parameters(), **settings), method, model)
    for batch in data:
        wrapper.step(closure_for(wrapper, model, batch))
    return wrapper


@contextlib.contextmanager
def counted_reductions(model: DistributedDataParallel) -> Iterator[list[str]]:
    """A list that grows by 'gradients' with every synchronised backward and by 'engine' with every other reduction."""
    reductions: list[str] = []

    def counted(group, bucket):  # DistributedDataParallel takes no annotations given as strings
        if bucket.is_last():
            reductions.append('gradients')
        return allreduce_hook(group, bucket)

    model.register_comm_hook(dist.group.WORLD, counted)
    all_reduce = dist.all_reduce

    def counted_too(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get('async_op'):  # that is how the hook reduces
            reductions.append('engine')
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted_too
    try:
        yield reductions
    finally:
        dist.all_reduce = all_reduce


def sam_by_hand(
    model: nn.Module,
    data: Sequence[Sequence[tuple[Any, Any]]],
    rho: float,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Any], Tensor] = nn.functional.mse_loss,
    perturbs: Callable[[int], bool] = lambda step: True,
) -> None:
    """SAM with m-sharpness in one process: ``data[step][rank]`` is each rank's batch,
    of what the model and the loss take."""
    parameters = list(model.parameters())

    def gradient(batch: tuple[Any, Any]) -> list[Tensor]:
        return list(torch.autograd.grad(loss(model(batch[0]), batch[1]), parameters))

    for step, of_ranks in enumerate(data):
        ascents = []
        for batch in of_ranks:
            g = gradient(batch)
            if perturbs(step):
                w = [p.detach().clone() for p in parameters]
                norm = torch.cat([x.double().reshape(-1) for x in g]).norm().item()
                with torch.no_grad():
                    for p, x in zip(parameters, g, strict=True):
                        p.add_(x, alpha=rho / (norm + 1e-12))
                g = gradient(batch)
                with torch.no_grad():
                    for p, x in zip(parameters, w, strict=True):
                        p.copy_(x)
            ascents.append(g)
        for p, *of_parameter in zip(parameters, *ascents, strict=True):
            p.grad = sum(of_parameter) / len(of_parameter)
        optimizer.step()


def flat(model: nn.Module) -> Tensor:
    """All weights as one vector, whole also where the model is sharded by ``fully_shard``."""
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([w.detach().reshape(-1) for w in weights])


def bits(model: nn.Module) -> list[Tensor]:
    """Copies of what this rank itself holds."""
    return [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


# What a trainer's run on several ranks must end in.


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    found = model(batch[0])
    of = nn.functional.mse_loss if batch[1].is_floating_point() else nn.functional.cross_entropy
    return of(found, batch[1])


def base_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


def by_passes(method: Any, data: Sequence[Batch], model: nn.Module, accumulate: int = 1) -> SharpnessAwareOptimizer:
    """Train in a plain loop, with the model's own no_sync; FSDP2 has none."""
    torch.manual_seed(3 + dist.get_rank())
    optimizer = SharpnessAwareOptimizer(base_of(model), method, model)
    no_sync: Any = getattr(model, 'no_sync', contextlib.nullcontext)
    for first in range(0, len(data), accumulate):
        window = data[first : first + accumulate]
        for number in optimizer.passes():
            optimizer.zero_grad()
            for batch in window:
                with contextlib.nullcontext() if batch is window[-1] else no_sync():
                    loss = loss_of(model, number.part(batch)) / accumulate
                    loss.backward(create_graph=method.backwards_create_graph)
    return optimizer


def assert_ranks_equal(model: nn.Module) -> None:
    first, *others = gathered(flat(model))
    assert all(torch.equal(first, other) for other in others), 'the ranks hold different weights'

"""The memory of a rank under FSDP2, measured on gloo ranks beside what ``benchmarks/arithmetic.py`` predicts.

Counted are the bytes of all tensors that are alive after each operation, in the passes and between them. The batch is
two samples, so that activations are next to nothing.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.arithmetic import Memory
from benchmarks.needs import Variant
from composer_sam import SharpnessAwareOptimizer
from composer_sam.vectors.layout import local

__all__ = ['LIMIT', 'as_predicted', 'measured', 'memory_of']

UNITS, WIDTH = 12, 256
ROUNDS = 3
LIMIT = 0.5 * WIDTH**2  # bytes: a quarter of a unit in bf16, the smallest buffer that could be forgotten


class _Live(TorchDispatchMode):
    """Keeps the largest number of bytes that all tensors together had since the last :meth:`reset`."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self._storages: dict[int, weakref.ref[UntypedStorage]] = {}
        self._peak = 0
        for tensor in tensors:
            self._see(tensor)

    def reset(self) -> int:
        """Return the peak, and begin the next."""
        peak, self._peak = self._peak, self._total()
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:  # that of a new storage is of one that gloo made for itself
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._see(local(leaf))
        self._peak = max(self._peak, self._total())
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = weakref.ref(storage)

    def _total(self) -> int:
        found = {key: reference() for key, reference in self._storages.items()}
        self._storages = {key: self._storages[key] for key, storage in found.items() if storage is not None}
        return sum(storage.nbytes() for storage in found.values() if storage is not None)


def measured(variant: Variant, micro_batches: int = 2, reduces_once: bool = False) -> dict[str, Any]:
    """Return the sizes of the model, and the bytes at the peak of each pass and of what comes before it.

    Called on every rank. With one micro-batch the last gradients are not there yet when their units are whole; with two
    a pass has both at once, as the prediction says. Gloo's threads may keep a buffer a moment longer, so the least of
    several rounds of steps counts, and in each the largest of its steps.

    Args:
        variant: the method.
        micro_batches: how many a pass has.
        reduces_once: whether a pass reduces the gradient after its last micro-batch only.
    """
    network: Any = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(UNITS)))
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in (*network, network):
        fully_shard(unit, mp_policy=mixed)
    optimizer: Any = torch.optim.AdamW(network.parameters())
    if variant.method is not None:
        optimizer = SharpnessAwareOptimizer(optimizer, variant.method, network)
    x = torch.randn(2, WIDTH)
    live = _Live([local(parameter) for parameter in network.parameters()])
    peaks: dict[str, int] = {}

    def note(what: str) -> None:
        peaks[what] = max(peaks.get(what, 0), live.reset())

    def closure() -> Tensor:
        number = (optimizer.pass_index if variant.method is not None else 0) + 1
        note(f'before pass {number}')
        optimizer.zero_grad()
        losses: list[Tensor] = []
        for index in range(micro_batches):
            network.set_requires_gradient_sync(not reduces_once or index == micro_batches - 1)
            losses.append(network(x).float().square().mean())
            losses[-1].backward()
        note(f'pass {number}')
        return torch.stack(losses).mean().detach()

    def run(steps: int) -> dict[str, int]:
        peaks.clear()
        for _ in range(steps):
            optimizer.step(closure)
            optimizer.zero_grad()
            live.reset()
        return dict(peaks)

    with live:
        run(variant.warmup)
        rounds = [run(variant.steps) for _ in range(ROUNDS)]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {
        'parameters': parameters,
        'unit': WIDTH**2,
        'shards': dist.get_world_size(),
        'peaks': {what: min(one[what] for one in rounds) for what in rounds[0]},
    }


def memory_of(found: dict[str, Any]) -> Memory:
    """Return the prediction for the model that was measured."""
    return Memory(found['parameters'], found['unit'], found['shards'])


def as_predicted(variant: Variant, found: dict[str, Any]) -> bool:
    """Return whether a step adds to the base step's peak what its method states, and not a copy less."""
    memory, method = memory_of(found), variant.method
    stated, peak = memory.perturbed(0 if method is None else method.extra_copies), max(found['peaks'].values())
    return stated - memory.copy < peak <= stated + LIMIT

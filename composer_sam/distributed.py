"""How the parameters are spread over ranks, and sums over all of them that count each element once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

__all__ = ['Layout', 'local', 'replicas']

Groups = tuple[dist.ProcessGroup, ...]


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that lies on this rank, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def replicas(model: nn.Module | None) -> DistributedDataParallel | None:
    """The model, if it is DistributedDataParallel: the one wrapper that can leave gradients unsynchronised."""
    return model if isinstance(model, DistributedDataParallel) else None


class Layout:
    """The trainable parameters of one optimizer, and the ranks over which each of them is sharded.

    Args:
        parameters: the parameters in the optimizer's order.
        model: the module they belong to; needed where FullyShardedDataParallel (FSDP1) flattens parameters, because
            only its wrapper knows the ranks that hold the other shards.

    Raises:
        ValueError: flattened parameters without a model, or a tensor-parallel layout whose gradients are partial sums.
    """

    def __init__(self, parameters: Sequence[Tensor], model: nn.Module | None = None):
        self.parameters = tuple(parameters)
        self.groups: tuple[Groups, ...] = _shard_groups(self.parameters, model)
        self.sharded = any(self.groups)
        self.accumulator = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32

    def stack(self, scalars: Sequence[Tensor]) -> Tensor:
        """0-dimensional tensors as one 1-dimensional tensor, on the first one's device."""
        device = scalars[0].device
        return torch.stack([s if s.device == device else s.to(device) for s in scalars])

    def total(self, partials: Sequence[Tensor], where: Sequence[int]) -> Tensor:
        """The sum of one partial result per parameter, over all ranks that hold a shard of it: a collective per set of
        ranks, with however few entries this rank contributes."""
        if not self.sharded:
            return self.stack(partials).sum() if partials else self._zero()
        by_groups: dict[Groups, list[Tensor]] = {groups: [] for groups in self.groups}
        for partial, place in zip(partials, where, strict=True):
            by_groups[self.groups[place]].append(partial)
        totals = []
        for groups, own in by_groups.items():
            subtotal = self.stack(own).sum() if own else self._zero()
            for group in groups:
                dist.all_reduce(subtotal, group=group)
            totals.append(subtotal)
        return self.stack(totals).sum()

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=self.accumulator, device=local(self.parameters[0]).device)


def _shard_groups(parameters: Sequence[Tensor], model: nn.Module | None) -> tuple[Groups, ...]:
    if not dist.is_available() or not dist.is_initialized():
        return ((),) * len(parameters)
    flattened = _flattened_groups(model)
    groups: list[Groups] = []
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            groups.append(_mesh_groups(parameter))
        elif id(parameter) in flattened:
            groups.append(flattened[id(parameter)])
        elif getattr(parameter, '_fsdp_flattened', False):
            raise ValueError(
                'a parameter is flattened by FullyShardedDataParallel, so its norm needs the other ranks: '
                'pass model=<the wrapped model> to SharpnessAwareOptimizer'
            )
        else:
            groups.append(())
    return tuple(groups)


def _mesh_groups(parameter: DTensor) -> Groups:
    groups = []
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_partial():
            raise ValueError(f'a parameter has the placements {parameter.placements}: partial sums are not supported')
        if isinstance(placement, Shard):
            groups.append(parameter.device_mesh.get_group(dimension))
    return tuple(groups)


def _flattened_groups(model: nn.Module | None) -> dict[int, Groups]:
    """For every parameter that FSDP1 manages, by its id, the ranks that hold the other shards."""
    groups: dict[int, Groups] = {}
    if model is None:
        return groups
    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle = module._handle
        if handle is None:
            continue
        flat = handle.flat_param
        members = (handle.process_group,) if handle.uses_sharded_strategy else ()
        for parameter in [flat, *(flat._params or [])]:
            groups[id(parameter)] = members
    return groups

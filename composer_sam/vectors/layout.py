"""The layout of parameters over ranks, and sums over all ranks that count each element once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from composer_sam.vectors.multi_tensor import copy_, split

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    'Groups',
    'Layout',
    'average',
    'is_dtensor',
    'is_first_rank',
    'largest',
    'local',
    'real',
    'several_processes',
    'shaped_like',
]

# The process groups over which one parameter is sharded; empty if every rank holds all of it.
Groups: TypeAlias = tuple[dist.ProcessGroup, ...]

_ORDINARY = (Tensor, nn.Parameter)

_SMALL = 4096  # elements; measured: from there on the copy takes longer than the call
_SMALL_TOGETHER = 2**20  # so that the copy of all stays small beside one of the weights of most models


class Layout:
    """The trainable parameters of one optimizer, and the ranks over which each of them is sharded.

    Args:
        parameters: the parameters in the optimizer's order.
        groups: for each parameter the process groups that hold its other shards; None if nothing is sharded.
        padded: whether the tensors hold padding beside the weights, as the flat parameters of FSDP1 do.
    """

    def __init__(self, parameters: Sequence[Tensor], groups: Sequence[Groups] | None = None, padded: bool = False):
        self.parameters = tuple(parameters)
        self.groups: tuple[Groups, ...] = ((),) * len(self.parameters) if groups is None else tuple(groups)
        self.padded = padded
        self.sharded = any(self.groups)
        self.devices = frozenset(parameter.device for parameter in self.parameters)
        # Whether nothing must be unwrapped: there are no DTensors and no complex numbers.
        self.plain = not any(is_dtensor(p) or p.is_complex() for p in parameters)
        double = any(p.dtype in (torch.float64, torch.complex128) for p in parameters)
        self.accumulator = torch.float64 if double else torch.float32
        self.small = self._small()

    def stack(self, scalars: Sequence[Tensor]) -> Tensor:
        """Return 0-dimensional tensors as one 1-dimensional tensor, on the device of the first."""
        if len(self.devices) == 1:
            return torch.stack(list(scalars))
        device = scalars[0].device
        return torch.stack([s if s.device == device else s.to(device) for s in scalars])

    def sums(self, columns: Sequence[Sequence[Tensor]], where: Sequence[int]) -> list[Tensor]:
        """Return the sum of each column of partial results, over all ranks that hold shards of their parameters.

        There is one collective per set of ranks, for all columns together, even if this rank contributes no entry.
        """
        if not self.sharded:
            return [self._total(column) for column in columns]
        totals: list[Tensor] = []
        for groups in dict.fromkeys(self.groups):
            members = [
                [p for p, place in zip(column, where, strict=True) if self.groups[place] == groups]
                for column in columns
            ]
            own = [self._total(partials) for partials in members]
            totals.append(_summed(self.stack(own), groups))
        device = totals[0].device
        return list(torch.stack([total.to(device) for total in totals]).sum(0))

    def totals(self, partials: Sequence[Tensor], where: Sequence[int]) -> list[Tensor]:
        """Return each parameter's partial result, summed over the ranks that hold a shard of it."""
        own = dict(zip(where, partials, strict=True))
        sums: dict[int, Tensor] = {}
        for groups in dict.fromkeys(self.groups):
            members = [place for place, its in enumerate(self.groups) if its == groups]
            together = _summed(self.stack([own.get(place, self._zero()) for place in members]), groups)
            sums.update(zip(members, together, strict=True))
        return [sums[place] for place in where]

    def _small(self) -> frozenset[int]:
        """Return the places of parameters so small that a call for each takes longer than copying them together."""
        if self.sharded or not self.plain:
            return frozenset()
        sizes = {
            place: parameter.numel()
            for place, parameter in enumerate(self.parameters)
            if parameter.device.type == 'cpu' and parameter.dtype == self.accumulator and parameter.numel() <= _SMALL
        }
        return frozenset(sizes if len(sizes) > 1 and sum(sizes.values()) <= _SMALL_TOGETHER else ())

    def _total(self, partials: Sequence[Tensor]) -> Tensor:
        if len(partials) < 2:
            return partials[0] if partials else self._zero()
        return self.stack(partials).sum()

    def _zero(self) -> Tensor:
        device = local(self.parameters[0]).device if self.parameters else None
        return torch.zeros((), dtype=self.accumulator, device=device)


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether ``tensor`` is spread over ranks by torch itself (FSDP2, tensor parallelism)."""
    if type(tensor) in _ORDINARY:
        return False
    # Not imported here, because that is slow: no DTensor can exist before its module is imported.
    module = sys.modules.get('torch.distributed.tensor')
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` on this rank, sharing its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def real(tensor: Tensor) -> Tensor:
    """Return the local part of a tensor, with complex numbers as pairs of real ones, sharing its memory.

    A tensor that is conjugated lazily, as a gradient may be, is computed first.
    """
    part = local(tensor)
    return torch.view_as_real(part.resolve_conj()) if part.is_complex() else part


def shaped_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a local tensor in the form that the parameter's optimizer expects: complex, or a DTensor."""
    if local(parameter).is_complex():
        value = torch.view_as_complex(value)
    if is_dtensor(parameter):
        return type(parameter).from_local(
            value,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    return value


def several_processes() -> bool:
    """Return whether there is a process group; it may have only one rank."""
    return dist.is_available() and dist.is_initialized()


def is_first_rank() -> bool:
    """Return whether this process is the one that reports to the user."""
    return not several_processes() or dist.get_rank() == 0


def largest(flag: Tensor) -> Tensor:
    """Return the largest of all ranks' flags, by one reduction in the memory of this rank's flag."""
    if several_processes():
        _all_reduce(flag, dist.ReduceOp.MAX)
    return flag


def average(
    values: Sequence[Tensor], where: Sequence[int], layout: Layout, group: dist.ProcessGroup | None
) -> tuple[list[Tensor], list[int]]:
    """Return the mean over ranks of one tensor per parameter, by one collective per data type.

    A parameter without a tensor on this rank counts as zero; it is in the result if any rank has a tensor for it.

    Returns:
        The averaged tensors and their indices in ``layout.parameters``.
    """
    own = dict(zip(where, values, strict=True))
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, parameter in enumerate(layout.parameters):
        kinds.setdefault((parameter.device, parameter.dtype), []).append(place)
    averaged: dict[int, Tensor] = {}
    for (device, dtype), places in kinds.items():
        pieces = [own.get(place) for place in places]
        sizes = [layout.parameters[place].numel() for place in places]
        buffer = torch.zeros(sum(sizes) + len(places), device=device, dtype=dtype)
        parts = split(buffer, [*sizes, len(places)])
        present = parts.pop()
        views = [
            segment.as_strided(parameter.size(), _dense_stride(parameter))
            for segment, parameter in zip(parts, (layout.parameters[place] for place in places), strict=True)
        ]
        filled = [(view, piece) for view, piece in zip(views, pieces, strict=True) if piece is not None]
        if filled:
            copy_([view for view, _ in filled], [piece for _, piece in filled])
        present.copy_(torch.tensor([piece is not None for piece in pieces]))
        _all_reduce(buffer, dist.ReduceOp.SUM, group)
        buffer /= dist.get_world_size(group)
        # Read from the device only if this rank cannot know the answer.
        everywhere = len(filled) == len(places)
        anywhere: list[bool] = [True] * len(places) if everywhere else (present > 0).tolist()  # pyright: ignore
        averaged.update((place, view) for place, view, some in zip(places, views, anywhere, strict=True) if some)
    found = sorted(averaged)
    return [averaged[place] for place in found], found


def _summed(tensor: Tensor, groups: Groups) -> Tensor:
    for group in groups:
        _all_reduce(tensor, dist.ReduceOp.SUM, group)
    return tensor


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None = None) -> None:
    dist.all_reduce(tensor, op, group)  # pyright: ignore[reportUnknownMemberType]


def _dense_stride(parameter: Tensor) -> tuple[int, ...]:
    """Return the strides of a gradient of the parameter: the parameter's own, without gaps."""
    return parameter.stride() if parameter.is_contiguous() else torch.empty_like(parameter, device='meta').stride()

"""How the parameters are spread over ranks, and sums over all of them that count each element once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _post_backward_final_callback, _reshard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    'Layout',
    'always_synchronises',
    'anywhere',
    'average',
    'local',
    'must_synchronise',
    'own_memory',
    'placed_like',
    'replicas',
    'several_processes',
    'to_rest',
]

Groups = tuple[dist.ProcessGroup, ...]


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that lies on this rank, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def several_processes() -> bool:
    """Whether there is a process group; it may have one rank only."""
    return dist.is_available() and dist.is_initialized()


def anywhere(flag: Tensor) -> Tensor:
    """The largest of all ranks' flags, by one reduction in the memory of this rank's."""
    if several_processes():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag


def replicas(model: nn.Module | None) -> DistributedDataParallel | None:
    """The model, if it is DistributedDataParallel: the one wrapper that can leave gradients unsynchronised."""
    return model if isinstance(model, DistributedDataParallel) else None


def must_synchronise(model: nn.Module | None) -> bool:
    """Whether the next pass cannot be left unsynchronised: the first of all under DistributedDataParallel with
    ``static_graph=True``, from which it learns the graph."""
    ddp = replicas(model)
    return ddp is not None and ddp.static_graph and not getattr(ddp, '_static_graph_delay_allreduce_enqueued', True)


def always_synchronises(model: nn.Module | None) -> bool:
    """Whether gradients cannot be left on their ranks at all, because the model is sharded over several."""
    if model is None or not several_processes() or dist.get_world_size() == 1:
        return False
    return any(isinstance(module, (FullyShardedDataParallel, FSDPModule)) for module in model.modules())


def to_rest(model: nn.Module | None) -> None:
    """Bring a distributed model back to rest after a pass that was cut short; no collectives.

    An exception leaves FSDP in the middle of its forward or backward: modules keep their gathered weights, which the
    next forward would use instead of gathering the restored ones, and the end of the next backward is not noticed.
    Composer repairs FSDP1 in the same way when it tries a batch again. DistributedDataParallel stays ready to
    synchronise: the next backward would, also of a pass to be left unsynchronised, and on this rank only where the
    other ranks' forwards had not begun.
    """
    ddp = replicas(model)
    if ddp is not None:
        ddp._has_rebuilt_buckets = False
        ddp.reducer._reset_state()
    for module in [] if model is None else model.modules():
        if isinstance(module, FullyShardedDataParallel):
            if module.check_is_root():
                _end_backward(module)
        elif isinstance(module, FSDPModule):
            _end_backward2(module)


def _end_backward(root: FullyShardedDataParallel) -> None:
    for state in root._all_fsdp_states:
        if state._handle is not None:
            # SHARD_GRAD_OP keeps what it gathered from the forward to the backward, also where it looks resharded
            _reshard(state, state._handle, free_unsharded_flat_param=state._handle.uses_sharded_strategy)
    _post_backward_final_callback(root, root)


def _end_backward2(module: FSDPModule) -> None:
    state = module._get_fsdp_state()
    group = state._fsdp_param_group
    for parameter in [] if group is None else group.fsdp_params:
        # without a gradient nothing is reduced
        parameter.unsharded_accumulated_grad = None
        if hasattr(parameter, '_unsharded_param'):
            parameter._unsharded_param.grad = None
    if state._is_root:
        state._state_ctx.iter_forward_root = None
        state._root_post_backward_final_callback()


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
        # Nothing to unwrap: neither DTensors nor complex numbers.
        self.plain = not any(isinstance(p, DTensor) or p.is_complex() for p in parameters)
        self.accumulator = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32

    def stack(self, scalars: Sequence[Tensor]) -> Tensor:
        """0-dimensional tensors as one 1-dimensional tensor, on the first one's device."""
        device = scalars[0].device
        return torch.stack([s if s.device == device else s.to(device) for s in scalars])

    def sums(self, columns: Sequence[Sequence[Tensor]], where: Sequence[int]) -> list[Tensor]:
        """For each column of partial results its sum, over all ranks that hold a shard of the parameter each belongs
        to: a collective per set of ranks for all columns together, with however few entries this rank contributes."""
        if not self.sharded:
            return [self.stack(column).sum() if column else self._zero() for column in columns]
        totals = []
        for groups in dict.fromkeys(self.groups):
            members = [
                [p for p, place in zip(column, where, strict=True) if self.groups[place] == groups]
                for column in columns
            ]
            own = [self.stack(partials).sum() if partials else self._zero() for partials in members]
            totals.append(_summed(self.stack(own), groups))
        device = totals[0].device
        return list(torch.stack([total.to(device) for total in totals]).sum(0))

    def totals(self, partials: Sequence[Tensor], where: Sequence[int]) -> list[Tensor]:
        """Each parameter's partial results, summed over the ranks that hold a shard of it."""
        own = dict(zip(where, partials, strict=True))
        sums: dict[int, Tensor] = {}
        for groups in dict.fromkeys(self.groups):
            members = [place for place, its in enumerate(self.groups) if its == groups]
            together = _summed(self.stack([own.get(place, self._zero()) for place in members]), groups)
            sums.update(zip(members, together, strict=True))
        return [sums[place] for place in where]

    def _zero(self) -> Tensor:
        device = local(self.parameters[0]).device if self.parameters else None
        return torch.zeros((), dtype=self.accumulator, device=device)


def _summed(tensor: Tensor, groups: Groups) -> Tensor:
    for group in groups:
        dist.all_reduce(tensor, group=group)
    return tensor


def average(
    values: Sequence[Tensor], where: Sequence[int], layout: Layout, group: dist.ProcessGroup | None
) -> tuple[list[Tensor], list[int]]:
    """The mean over ranks of one tensor per parameter, in one collective per data type.

    A parameter that has no tensor on this rank counts as zero, and is in the result if any rank has one for it.

    Returns:
        The averaged tensors and their places in ``layout.parameters``.
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
        *segments, present = buffer.split([*sizes, len(places)])
        views = [
            segment.as_strided(parameter.size(), _dense_stride(parameter))
            for segment, parameter in zip(segments, (layout.parameters[place] for place in places), strict=True)
        ]
        filled = [(view, piece) for view, piece in zip(views, pieces, strict=True) if piece is not None]
        if filled:
            torch._foreach_copy_([view for view, _ in filled], [piece for _, piece in filled])
        present.copy_(torch.tensor([piece is not None for piece in pieces]))
        dist.all_reduce(buffer, group=group)
        buffer /= dist.get_world_size(group)
        # The device is asked only for what this rank cannot know.
        anywhere = [True] * len(places) if len(filled) == len(places) else (present > 0).tolist()
        averaged.update((place, view) for place, view, some in zip(places, views, anywhere, strict=True) if some)
    found = sorted(averaged)
    return [averaged[place] for place in found], found


def placed_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient spread over ranks as its parameter is: tensor parallelism leaves parts of a sum where every rank has
    the parameter but saw some of the samples only, and base optimizers would add them up as well."""
    if isinstance(parameter, DTensor) and isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
        return gradient.redistribute(placements=parameter.placements)
    return gradient


def own_memory(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in memory that no later pass writes to.

    With ``gradient_as_bucket_view`` DistributedDataParallel hands out views of its buckets, and fills these again in
    the next pass. FSDP's gradients are views as well, but of memory made anew in every backward.
    """
    if isinstance(parameter, DTensor) or hasattr(parameter, '_fsdp_flattened'):
        return gradient
    alone = gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()
    return gradient if alone else gradient.clone()


def _dense_stride(parameter: Tensor) -> tuple[int, ...]:
    """The strides a gradient of the parameter has: the parameter's own, without gaps."""
    return parameter.stride() if parameter.is_contiguous() else torch.empty_like(parameter, device='meta').stride()


def _shard_groups(parameters: Sequence[Tensor], model: nn.Module | None) -> tuple[Groups, ...]:
    if not several_processes():
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

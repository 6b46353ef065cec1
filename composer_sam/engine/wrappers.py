"""What the engine must know of torch's model wrappers (DistributedDataParallel, FSDP1, FSDP2).

Everything private to them is touched in this file alone, and looked up when it is needed: a release of torch that
renames something breaks no import, and where the name is used the error says which one is gone.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# The private parts of torch's wrappers have no types.

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from composer_sam.vectors.layout import Groups, Layout, is_dtensor, several_processes

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

__all__ = [
    'always_synchronises',
    'broadcast_buffers',
    'fsdp1_flattened',
    'fsdp1_unsharded',
    'layout_of',
    'must_synchronise',
    'own_memory',
    'placed_like',
    'replicas',
    'to_rest',
]


# What torch's wrappers are, and how they spread parameters.


def replicas(model: nn.Module | None) -> DistributedDataParallel | None:
    """The model, if it is DistributedDataParallel: the one wrapper that can leave gradients unsynchronised."""
    return model if isinstance(model, DistributedDataParallel) else None


def must_synchronise(model: nn.Module | None) -> bool:
    """Whether the next pass cannot be left unsynchronised.

    That is the first pass of all under DistributedDataParallel with ``static_graph=True``, from which it learns the
    graph.
    """
    ddp = replicas(model)
    if ddp is None or not ddp.static_graph:
        return False
    with _private('static graphs of DistributedDataParallel'):
        return not ddp._static_graph_delay_allreduce_enqueued


def always_synchronises(model: nn.Module | None) -> bool:
    """Whether gradients cannot be left on their ranks at all, because the model is sharded over several."""
    fsdp = _fsdp()
    if model is None or fsdp is None or not several_processes() or dist.get_world_size() == 1:
        return False
    return any(isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)) for module in model.modules())


def fsdp1_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 has made the parameter a view of a flat one, or a flat one itself."""
    return hasattr(parameter, '_fsdp_flattened')


def fsdp1_unsharded(parameter: Tensor, groups: Groups) -> bool:
    """Whether FSDP1 manages the parameter without sharding it (NO_SHARD)."""
    return not groups and fsdp1_flattened(parameter)


def layout_of(parameters: Sequence[Tensor], model: nn.Module | None = None) -> Layout:
    """The layout of parameters as torch's wrappers have spread them.

    Args:
        parameters: the parameters in the optimizer's order.
        model: the module they belong to; needed where FSDP1 flattens parameters, because only its wrapper knows the
            ranks that hold the other shards.

    Raises:
        ValueError: flattened parameters without a model, or a tensor-parallel layout whose gradients are partial sums.
    """
    if not several_processes():
        return Layout(parameters)
    flattened = _fsdp1_groups(model)
    groups: list[Groups] = []
    for parameter in parameters:
        if is_dtensor(parameter):
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
    fsdp = _fsdp()
    return Layout(parameters, groups, fsdp is not None and any(isinstance(p, fsdp.FlatParameter) for p in parameters))


def placed_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient spread over ranks as its parameter is.

    Tensor parallelism leaves parts of a sum where every rank has the parameter but saw some of the samples only, and
    base optimizers would add them up as well.
    """
    if is_dtensor(parameter) and is_dtensor(gradient) and gradient.placements != parameter.placements:
        return gradient.redistribute(placements=parameter.placements)
    return gradient


def own_memory(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in memory that no later pass writes to.

    With ``gradient_as_bucket_view`` DistributedDataParallel hands out views of its buckets, and fills these again in
    the next pass. FSDP's gradients are views as well, but of memory made anew in every backward.
    """
    if is_dtensor(parameter) or fsdp1_flattened(parameter):
        return gradient
    alone = gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()
    return gradient if alone else gradient.clone()


# What the engine asks of them.


def broadcast_buffers(ddp: DistributedDataParallel) -> bool:
    """Hand rank 0's buffers to all ranks, where the next forward would; whether it would."""
    with _private('the buffers of DistributedDataParallel'):
        if not ddp.will_sync_module_buffers():
            return False
        ddp._sync_buffers()
    return True


def to_rest(model: nn.Module | None) -> None:
    """Bring a distributed model back to rest after a pass that was cut short; no collectives.

    An exception leaves FSDP in the middle of its forward or backward: modules keep their gathered weights, which the
    next forward would use instead of gathering the restored ones, and the end of the next backward is not noticed.
    DistributedDataParallel stays ready to synchronise: the next backward would, also of a pass to be left
    unsynchronised, and on this rank only where the other ranks' forwards had not begun.
    """
    ddp = replicas(model)
    if ddp is not None:
        with _private('the reducer of DistributedDataParallel'):
            ddp._has_rebuilt_buckets = False
            ddp.reducer._reset_state()
    fsdp = _fsdp()
    if model is None or fsdp is None:
        return
    for module in fsdp.FullyShardedDataParallel.fsdp_modules(model):
        if module.check_is_root():
            _fsdp1_to_rest(module)
    for module in _outermost(model, fsdp.FSDPModule):
        _fsdp2_to_rest(module, fsdp.FSDPModule)


# How it is done.


def _fsdp() -> ModuleType | None:
    """torch's FSDP, if it is in use: importing it takes longer than the rest of torch, and nobody wraps without it."""
    module = sys.modules.get('torch.distributed.fsdp')
    return module if module is not None and hasattr(module, 'FullyShardedDataParallel') else None


@contextlib.contextmanager
def _private(what: str) -> Iterator[None]:
    """Say what is missing where torch has renamed something private."""
    try:
        yield
    except (AttributeError, ImportError) as error:
        raise RuntimeError(
            f'torch {torch.__version__} keeps {what} differently from the versions this release of composer_sam was '
            f'tested with ({error}): use a torch version named in the README, or a newer composer_sam'
        ) from error


def _outermost(module: nn.Module, kind: type) -> list[Any]:
    """The modules of a kind that lie in no other of that kind."""
    if isinstance(module, kind):
        return [module]
    return [found for child in module.children() for found in _outermost(child, kind)]


def _fsdp1_to_rest(root: FullyShardedDataParallel) -> None:
    # Composer repairs FSDP1 in the same way when it tries a batch again.
    with _private('the runtime state of FullyShardedDataParallel'):
        from torch.distributed.fsdp._runtime_utils import _post_backward_final_callback, _reshard

        for state in root._all_fsdp_states:
            if state._handle is not None:
                # SHARD_GRAD_OP keeps what it gathered from the forward to the backward, also where it looks resharded
                _reshard(state, state._handle, free_unsharded_flat_param=state._handle.uses_sharded_strategy)
        _post_backward_final_callback(root, root)


def _fsdp2_to_rest(root: Any, kind: type) -> None:
    if hasattr(root, 'reset_iter_state'):  # public since torch 2.13
        root.reset_iter_state()
        return
    with _private('the runtime state of fully_shard'):
        for module in root.modules():
            if not isinstance(module, kind):
                continue
            state: Any = module._get_fsdp_state()  # pyright: ignore[reportAttributeAccessIssue]
            group = state._fsdp_param_group
            for parameter in [] if group is None else group.fsdp_params:
                # without a gradient nothing is reduced
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, '_unsharded_param'):
                    parameter._unsharded_param.grad = None
            if state._is_root:
                state._state_ctx.iter_forward_root = None
                state._root_post_backward_final_callback()


def _fsdp1_groups(model: nn.Module | None) -> dict[int, Groups]:
    """For every parameter that FSDP1 manages, by its id, the ranks that hold the other shards."""
    groups: dict[int, Groups] = {}
    fsdp = _fsdp()
    if model is None or fsdp is None:
        return groups
    for module in fsdp.FullyShardedDataParallel.fsdp_modules(model):
        with _private('the flat parameters of FullyShardedDataParallel'):
            handle = module._handle
            if handle is None:
                continue
            flat = handle.flat_param
            members = (handle.process_group,) if handle.uses_sharded_strategy else ()
            for parameter in [flat, *(flat._params or [])]:
                groups[id(parameter)] = members
    return groups


def _mesh_groups(parameter: DTensor) -> Groups:
    groups: list[dist.ProcessGroup] = []
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_partial():
            raise ValueError(f'a parameter has the placements {parameter.placements}: partial sums are not supported')
        if not placement.is_replicate():
            groups.append(parameter.device_mesh.get_group(dimension))
    return tuple(groups)

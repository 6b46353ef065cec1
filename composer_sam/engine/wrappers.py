"""The engine's access to torch's model wrappers (DistributedDataParallel, FSDP1, FSDP2).

Only this file uses their private names, and it looks them up when it needs them. If a torch release renames one, every
import still works, and the error at the place of use says which name is missing.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# The private parts of torch's wrappers have no types.

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

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
    'group_of',
    'is_compiled',
    'is_fsdp',
    'layout_of',
    'must_synchronise',
    'outside_of_no_sync',
    'own_memory',
    'placed_like',
    'refuse_reentrant_checkpoints',
    'replicas',
    'script_attributes',
    'sharded_like',
    'stay_unsynchronised',
    'to_rest',
]


# Which wrapper a model has, and how it spreads parameters over ranks.


def replicas(model: nn.Module | None) -> DistributedDataParallel | None:
    """Return the model if it is DistributedDataParallel, the only wrapper that can leave gradients unsynchronised."""
    return model if isinstance(model, DistributedDataParallel) else None


def group_of(ddp: DistributedDataParallel) -> dist.ProcessGroup:
    """Return the process group of the ranks that hold replicas."""
    return cast(dist.ProcessGroup, ddp.process_group)


def must_synchronise(model: nn.Module | None) -> bool:
    """Return whether the next pass cannot be left unsynchronised.

    This holds for the very first pass under DistributedDataParallel with ``static_graph=True``, which learns the graph
    from it.
    """
    ddp = replicas(model)
    if ddp is None or not ddp.static_graph:
        return False
    with _private('static graphs of DistributedDataParallel'):
        return not ddp._static_graph_delay_allreduce_enqueued


def always_synchronises(model: nn.Module | None) -> bool:
    """Return whether gradients are always averaged over ranks, because the model is sharded over several ranks."""
    if model is None or not several_processes() or dist.get_world_size() == 1:
        return False
    return any(is_fsdp(module) for module in model.modules())


def is_fsdp(module: nn.Module) -> bool:
    """Return whether FSDP1 or FSDP2 has wrapped the module."""
    fsdp = _fsdp()
    return fsdp is not None and isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule))


def is_compiled(module: nn.Module) -> bool:
    """Return whether a call of the module runs a compiled graph: ``torch.compile(module)``, ``module.compile()``."""
    return '_orig_mod' in module._modules or module._compiled_call_impl is not None


def fsdp1_flattened(parameter: Tensor) -> bool:
    """Return whether FSDP1 has made the parameter a view of a flat parameter, or a flat parameter itself."""
    return hasattr(parameter, '_fsdp_flattened')


def fsdp1_unsharded(parameter: Tensor, groups: Groups) -> bool:
    """Return whether FSDP1 manages the parameter without sharding it (NO_SHARD)."""
    return not groups and fsdp1_flattened(parameter)


def layout_of(parameters: Sequence[Tensor], model: nn.Module | None = None) -> Layout:
    """Return the layout of parameters as torch's wrappers have spread them.

    Args:
        parameters: the parameters in the optimizer's order.
        model: the module they belong to; needed where FSDP1 flattens parameters, because only its wrapper knows the
            ranks that hold the other shards.

    Raises:
        ValueError: parameters are flattened and there is no model, or a tensor-parallel layout has partial sums.
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
    """Return the gradient spread over ranks as its parameter is.

    With tensor parallelism, every rank may have the whole parameter but only a partial sum of its gradient, from some
    of the samples. Base optimizers would also add up these parts.
    """
    if is_dtensor(parameter) and is_dtensor(gradient) and gradient.placements != parameter.placements:
        return gradient.redistribute(placements=parameter.placements)
    return gradient


def own_memory(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return the gradient in memory that no later pass writes to.

    With ``gradient_as_bucket_view`` DistributedDataParallel returns views of its buckets, and fills the buckets again
    in the next pass. FSDP's gradients are also views, but of memory that every backward allocates.
    """
    if is_dtensor(parameter) or fsdp1_flattened(parameter):
        return gradient
    alone = gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()
    return gradient if alone else gradient.clone()


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor as the parameter is sharded; it is one after a whole checkpoint of FSDP2 was loaded."""
    if not is_dtensor(parameter) or is_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


# What the engine makes the wrappers do.


def broadcast_buffers(ddp: DistributedDataParallel) -> bool:
    """Broadcast rank 0's buffers to all ranks if the next forward would do so; return whether it would."""
    with _private('the buffers of DistributedDataParallel'):
        if not ddp.will_sync_module_buffers():
            return False
        ddp._sync_buffers()
    return True


@contextlib.contextmanager
def outside_of_no_sync(model: nn.Module | None) -> Generator[None]:
    """Return the context in which an unsynchronised pass can begin that outlasts the loop's own ``no_sync``.

    A loop opens one for every micro-batch but the last. A pass that began inside of it would put back what it found
    there, and gradients would never be averaged again.
    """
    ddp = replicas(model)
    if ddp is None or ddp.require_backward_grad_sync:
        yield
        return
    ddp.require_backward_grad_sync = True
    try:
        yield
    finally:
        ddp.require_backward_grad_sync = False


def stay_unsynchronised(model: nn.Module | None) -> None:
    """Leave the next backward unsynchronised in a pass that is: the end of the loop's own ``no_sync`` has undone it."""
    ddp = replicas(model)
    if ddp is not None:
        ddp.require_backward_grad_sync = False


@contextlib.contextmanager
def refuse_reentrant_checkpoints() -> Generator[None]:
    """Raise ValueError where a reentrant activation checkpoint is used: its second derivatives are wrong, silently."""
    from torch.utils import checkpoint

    def refuse(*_: Any) -> None:
        raise ValueError(
            'a reentrant activation checkpoint has no second derivatives: write checkpoint(..., use_reentrant=False)'
        )

    with _private('reentrant activation checkpoints'):
        original = checkpoint.CheckpointFunction.forward
    checkpoint.CheckpointFunction.forward = cast(Any, staticmethod(refuse))
    try:
        yield
    finally:
        checkpoint.CheckpointFunction.forward = staticmethod(original)


def to_rest(model: nn.Module | None) -> None:
    """Reset a distributed model after an interrupted pass, without collectives.

    An exception leaves FSDP in the middle of its forward or backward: modules keep their gathered weights, which the
    next forward would use instead of gathering the restored ones, and FSDP does not notice the end of the next
    backward. DistributedDataParallel stays ready to synchronise: the next backward would synchronise even if its pass
    must not, and would do so only on this rank if the forwards of the other ranks had not begun.
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


# Private parts.


def _fsdp() -> ModuleType | None:
    """Return torch's FSDP module if it is imported. A wrapped model has imported it, and importing it here is slow."""
    module = sys.modules.get('torch.distributed.fsdp')
    return module if module is not None and hasattr(module, 'FullyShardedDataParallel') else None


def script_attributes(module: torch.jit.ScriptModule) -> list[str]:
    """Return the names of what a TorchScript module's forward may assign beside its parameters and buffers."""
    with _private('the attributes of TorchScript modules'):
        names = module._concrete_type.get_attributes()
    tensors = {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    return [name for name in names if name not in tensors]


@contextlib.contextmanager
def _private(what: str) -> Generator[None]:
    """Raise an error that says what is missing if torch has renamed a private name."""
    try:
        yield
    except (AttributeError, ImportError) as error:
        raise RuntimeError(
            f'torch {torch.__version__} keeps {what} differently from the versions this release of composer_sam was '
            f'tested with ({error}): use a torch version named in the README, or a newer composer_sam'
        ) from error


def _outermost(module: nn.Module, kind: type) -> list[Any]:
    """Return the modules of a kind that are inside no other module of that kind."""
    if isinstance(module, kind):
        return [module]
    return [found for child in module.children() for found in _outermost(child, kind)]


def _fsdp1_to_rest(root: FullyShardedDataParallel) -> None:
    # Composer resets FSDP1 in the same way when it retries a batch.
    with _private('the runtime state of FullyShardedDataParallel'):
        from torch.distributed.fsdp._runtime_utils import _post_backward_final_callback, _reshard

        for state in root._all_fsdp_states:
            if state._handle is not None:
                # SHARD_GRAD_OP keeps the gathered weights from the forward to the backward, even if it looks resharded
                _reshard(state, state._handle, free_unsharded_flat_param=state._handle.uses_sharded_strategy)
        _post_backward_final_callback(root, root)


def _fsdp2_to_rest(root: Any, kind: type) -> None:
    with _private('the runtime state of fully_shard'):
        if root._get_fsdp_state()._is_root is None:
            return  # no forward has begun, so nothing is under way
        if hasattr(root, 'reset_iter_state'):  # public in newer versions of torch
            root.reset_iter_state()
            return
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
    """Return, for every parameter that FSDP1 manages, by its id, the process groups that hold the other shards."""
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

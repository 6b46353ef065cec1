"""Gradient scaling for fp16 in steps of several passes: every pass's gradient is unscaled and checked."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from composer_sam.vectors.layout import largest

__all__ = ['finite', 'unscale']


def unscale(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Unscale the gradients of one pass; return False if one of them is not finite on any rank."""
    if not scaler.is_enabled():
        return True
    scaler.unscale_(optimizer)
    return finite(scaler, optimizer)


def finite(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Return whether the gradients just unscaled are finite on all ranks, by one reduction of one number.

    All passes of a step use the same scale, because only ``scaler.update()`` changes it. The scaler notes a step that
    ends with an overflow, so that ``update()`` lowers the scale once.
    """
    record = _record(scaler, optimizer)
    found = record['found_inf_per_device']
    if not found:  # this rank has no gradient, but must take part in the reduction and in the update
        device = optimizer.param_groups[0]['params'][0].device
        found[device] = torch.zeros(1, device=device)
    flags: list[torch.Tensor] = list(found.values())
    overflow = largest(torch.stack([flag.reshape(()).to(flags[0].device) for flag in flags]).amax())
    for flag in flags:
        flag.fill_(overflow)
    return not overflow.item()


def _record(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> dict[str, Any]:
    """Return the scaler's record of the optimizer, made ready for a further pass of the same step.

    torch's scaler expects one backward per update, and has no public way to unscale a second one.
    """
    try:
        from torch.amp.grad_scaler import OptState

        record = scaler._per_optimizer_states[id(optimizer)]  # pyright: ignore[reportPrivateUsage]
    except (AttributeError, ImportError) as error:
        raise RuntimeError(
            f"torch {torch.__version__}'s GradScaler differs from those that this release of composer_sam was tested "
            f'with ({error}): use a torch version named in the README, or bfloat16'
        ) from error
    record['stage'] = OptState.READY
    return record

"""Gradient scaling for fp16 where one step has several passes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

__all__ = ['unscale']


def unscale(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Unscale the gradients of one pass; False where one of them is not finite, on any rank.

    All passes of a step use the same scale, because it changes only in ``scaler.update()``; a step that ends with an
    overflow is noted in the scaler, so that ``update()`` backs off once, and a step that ends without is one step for
    its growth. One reduction of one number per pass.
    """
    if not scaler.is_enabled():
        return True
    scaler.unscale_(optimizer)
    # torch's scaler expects one backward per update; a further pass of the same step is to be unscaled again.
    record = scaler._per_optimizer_states[id(optimizer)]
    record['stage'] = OptState.READY
    found = list(record['found_inf_per_device'].values())
    overflow = torch.stack([value.to(found[0].device) for value in found]).amax() if found else torch.zeros(())
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(overflow, op=dist.ReduceOp.MAX)
        for value in found:
            value.fill_(overflow)
    return not overflow.item()

"""Gradient scaling for fp16 where one step has several passes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from composer_sam.distributed import anywhere

__all__ = ['GradScaler', 'finite', 'unscale']


class GradScaler(torch.amp.GradScaler):
    """The scaler that a Trainer steps sharpness-aware optimizers with, at precision ``amp_fp16``.

    The Trainer scales every pass's loss and unscales its gradient; this class looks at every pass: where a gradient
    overflows, on any rank, the step is skipped on all ranks. All passes of a step have the same scale, and to the
    scale's growth they are one step. It has torch's name because Composer files a scaler's state under its class's
    name: checkpoints of fp16 runs load with and without a method.
    """

    def step(self, optimizer: Optimizer, *args: Any, closure: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """Step the optimizer with a closure that returns None where a pass overflowed."""
        if closure is None:
            return super().step(optimizer, *args, **kwargs)
        # What a failed step noted is not this one's.
        self._per_optimizer_states.pop(id(optimizer), None)

        @functools.wraps(closure)
        def checked(*args: Any, **options: Any) -> Any:
            loss = closure(*args, **options)
            return loss if finite(self, optimizer) else None

        checked.checks_gradients = True  # pyright: ignore[reportAttributeAccessIssue]
        return optimizer.step(checked)


def unscale(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Unscale the gradients of one pass; False where one of them is not finite, on any rank."""
    if not scaler.is_enabled():
        return True
    scaler.unscale_(optimizer)
    return finite(scaler, optimizer)


def finite(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Whether the gradients of the pass just unscaled are finite, on all ranks; one reduction of one number.

    All passes of a step use the same scale, because it changes only in ``scaler.update()``; a step that ends with an
    overflow is noted in the scaler, so that ``update()`` backs off once.
    """
    record = scaler._per_optimizer_states[id(optimizer)]
    # torch's scaler expects one backward per update; a further pass of the same step is to be unscaled again.
    record['stage'] = OptState.READY
    found = record['found_inf_per_device']
    if not found:  # this rank has no gradient, but must take part in the reduction and in the update
        device = optimizer.param_groups[0]['params'][0].device
        found[device] = torch.zeros(1, device=device)
    flags = list(found.values())
    overflow = anywhere(torch.stack([flag.reshape(()).to(flags[0].device) for flag in flags]).amax())
    for flag in flags:
        flag.fill_(overflow)
    return not overflow.item()

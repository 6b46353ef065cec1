"""The gradient scaler of a Trainer at precision ``amp_fp16``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from composer_sam.engine.scaling import finite

__all__ = ['GradScaler']


class GradScaler(torch.amp.GradScaler):
    """The scaler with which a Trainer steps sharpness-aware optimizers at precision ``amp_fp16``.

    The Trainer scales every pass's loss and unscales its gradient. This class checks every pass: if a gradient
    overflows on any rank, the step is skipped on all ranks. All passes of a step have the same scale, and for the
    scale's growth they count as one step. The class has the same name as torch's, because Composer stores a scaler's
    state under the name of its class: checkpoints of fp16 runs load with and without a method.
    """

    def step(self, optimizer: Optimizer, *args: Any, closure: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """Step the optimizer with a closure that returns None if a pass overflowed."""
        if closure is None:
            return super().step(optimizer, *args, **kwargs)
        # Drop what a failed step noted.
        self._per_optimizer_states.pop(id(optimizer), None)

        @functools.wraps(closure)
        def checked(*args: Any, **options: Any) -> Any:
            loss = closure(*args, **options)
            return loss if finite(self, optimizer) else None

        checked.checks_gradients = True  # pyright: ignore[reportAttributeAccessIssue]
        return optimizer.step(checked)

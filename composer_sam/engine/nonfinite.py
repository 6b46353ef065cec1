"""The check for losses and gradients that are not finite: it reports the first one, and skips steps if asked to."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from composer_sam.vectors import multi_tensor
from composer_sam.vectors.layout import is_first_rank, largest, local, real

__all__ = ['NonFinite', 'is_known']

log = logging.getLogger(__name__)


class NonFinite:
    """The policy of a step for a loss or a gradient that is not finite.

    ``'propagate'``: the base optimizer steps with it, as it does alone. Gradients are not checked; a loss is checked
    only if its value is in CPU memory. ``'skip'``: every pass's loss and gradient are checked on all ranks, which takes
    a read of the gradient, a reduction of one number and a wait for the device.
    """

    def __init__(self, policy: str):
        self.skips = policy == 'skip'
        self.step = 0
        self._reported = False
        self._loss: Any = None

    def see(self, loss: Any, index: int) -> None:
        """Note the loss of a pass; report it if it is not finite and the check needs no wait for the device."""
        if self.skips:
            self._loss = loss
        elif is_known(loss) and not math.isfinite(loss):
            self._report(index, f'the loss is {float(loss)}', 'The base optimizer steps with its gradient')

    def found(self, parameters: Sequence[Tensor], index: int) -> bool:
        """Return whether the loss or the gradient of the last pass is not finite on any rank, and report it if so."""
        loss, self._loss = self._loss, None
        if not largest(_not_finite(parameters, loss)).item():
            return False
        self._report(index, 'the loss or the gradient is not finite', 'The step is skipped')
        return True

    def _report(self, index: int, what: str, then: str) -> None:
        # Only rank 0 reports: what only another rank saw reaches rank 0 in the averaged gradient.
        if self._reported or not is_first_rank():
            return
        self._reported = True
        advice = '' if self.skips else "; on_nonfinite='skip' skips such steps"
        log.warning('%s in pass %d of step %d. %s%s. Reported once.', what, index, self.step, then, advice)


def is_known(loss: Any) -> bool:
    """Return whether the loss is one number in CPU memory."""
    return isinstance(loss, float) or (isinstance(loss, Tensor) and loss.is_cpu and loss.numel() == 1)


@torch.no_grad()
def _not_finite(parameters: Sequence[Tensor], loss: Any) -> Tensor:
    """Return 1 if a number is not finite on this rank, else 0."""
    gradients = [real(p.grad) for p in parameters if p.grad is not None]
    filled = [gradient for gradient in gradients if gradient.numel()]  # the maximum of an empty tensor is an error
    device = local(parameters[0]).device
    # The largest magnitude cannot overflow, unlike a sum or a norm of squares.
    magnitudes = multi_tensor.norm(filled, math.inf)
    if loss is not None:
        magnitudes.append(torch.as_tensor(loss).detach().abs().max())
    if not magnitudes:
        return torch.zeros((), device=device)
    return torch.stack([number.to(device) for number in magnitudes]).isfinite().logical_not().any().float()

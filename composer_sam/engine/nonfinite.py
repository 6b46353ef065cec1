"""Losses and gradients that are not finite: noticed, reported once, and skipped where the user wants that."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from composer_sam.vectors.layout import largest, local, real, several_processes

__all__ = ['NonFinite']

log = logging.getLogger(__name__)


class NonFinite:
    """What a step does about a loss or a gradient that is not finite.

    ``'propagate'``: what the base optimizer alone does, which is to step with it; nobody looks at gradients, and only a
    loss that is known anyway is looked at. ``'skip'``: every pass's loss and gradient are looked at on all ranks, which
    takes a read of the gradient, a reduction of one number and waiting for the device.
    """

    def __init__(self, policy: str):
        self.skips = policy == 'skip'
        self.step = 0
        self._reported = False
        self._loss: Any = None

    def see(self, loss: Any, index: int) -> None:
        """Note the loss of a pass, and report it if it is not finite and needs no waiting for the device."""
        if self.skips:
            # Without its graph, which would outlive the step.
            self._loss = loss.detach() if isinstance(loss, Tensor) else loss
        if not self.skips and _known(loss) and not math.isfinite(loss):
            self._report(index, f'the loss is {float(loss)}', 'The base optimizer steps with its gradient')

    def found(self, parameters: Sequence[Tensor], index: int) -> bool:
        """Whether the loss or the gradient of the pass just done is not finite on any rank; reports it if so."""
        loss, self._loss = self._loss, None
        if not largest(_not_finite(parameters, loss)).item():
            return False
        self._report(index, 'the loss or the gradient is not finite', 'The step is skipped')
        return True

    def _report(self, index: int, what: str, then: str) -> None:
        # Rank 0 speaks for all: where only another rank saw it, the averaged gradient brings it to rank 0.
        if self._reported or (several_processes() and dist.get_rank() != 0):
            return
        self._reported = True
        advice = '' if self.skips else "; on_nonfinite='skip' skips such steps"
        log.warning('%s in pass %d of step %d. %s%s. Reported once.', what, index, self.step, then, advice)


def _known(loss: Any) -> bool:
    """Whether the loss is one number in the CPU's memory."""
    return isinstance(loss, float) or (isinstance(loss, Tensor) and loss.device.type == 'cpu' and loss.numel() == 1)


@torch.no_grad()
def _not_finite(parameters: Sequence[Tensor], loss: Any) -> Tensor:
    """1 where a number is not finite on this rank, else 0."""
    gradients = [real(p.grad) for p in parameters if p.grad is not None]
    filled = [gradient for gradient in gradients if gradient.numel()]  # the largest of no numbers is an error
    device = local(parameters[0]).device
    # The largest magnitude, unlike a sum or a norm of squares, never overflows by itself.
    magnitudes = list(torch._foreach_norm(filled, math.inf)) if filled else []
    if loss is not None:
        magnitudes.append(torch.as_tensor(loss).detach().abs().max())
    if not magnitudes:
        return torch.zeros((), device=device)
    return torch.stack([number.to(device) for number in magnitudes]).isfinite().logical_not().any().float()

"""How a pass is asked of the closure handed to ``optimizer.step``: a user's own, or Composer's."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from composer_sam.distributed import replicas
from composer_sam.step import PLAIN, Pass

__all__ = ['Closure', 'makes_state', 'unsynchronised']


class Closure:
    """A closure that evaluates the loss and calls backward, once for every pass.

    One that takes ``loss_dict`` and ``ddp_sync`` is treated as Composer's: it leaves gradients unsynchronised itself,
    logs the losses of the first pass only, and a loss of ``None`` says that a gradient overflowed.
    """

    def __init__(self, function: Callable[..., Any]):
        self.composer = 'loss_dict' in _parameters(function)
        # fp16: the scaler has looked at every pass's gradient on all ranks, and nobody needs to look again
        self.checked = getattr(function, 'checks_gradients', False)
        self.function = function if torch.is_grad_enabled() else torch.enable_grad()(function)

    def __call__(self, request: Pass, index: int) -> Any:
        """The loss of one pass.

        Raises:
            ValueError: an ordinary closure returned no loss.
        """
        if self.composer:
            if request is PLAIN:
                return self.function()
            options = {} if index == 0 else {'loss_dict': {}}
            return self.function(ddp_sync=request.sync, **options)
        loss = self.function()
        if loss is None:
            raise ValueError('the closure returned None: it must return the loss it called backward() on')
        return loss


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    """The names of a function's parameters. A plain function's code tells them in no time; its signature takes as long
    as a pass of a small layer, and is asked of whatever wraps another."""
    code = getattr(function, '__code__', None)
    if code is None or hasattr(function, '__wrapped__'):
        return inspect.signature(function).parameters
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def unsynchronised(request: Pass, closure: Closure | None, model: nn.Module | None, trainer: Any) -> Any:
    """The context that leaves a pass's gradient on its rank, if it is to; Composer's closure mostly does so itself."""
    ddp = None if request.sync else replicas(model)
    if ddp is None:
        return contextlib.nullcontext()
    if closure is None or not closure.composer:
        return ddp.no_sync()
    return contextlib.nullcontext() if trainer is None else trainer.unsynchronised(closure.function)


def makes_state(groups: list[dict[str, Any]], state: Any) -> bool:
    """Whether a step without a closure is how torch.distributed.checkpoint makes a fresh optimizer's state: one step
    with zero gradients at lr 0."""
    gradients = [p.grad for group in groups for p in group['params'] if p.grad is not None]
    idle = all(float(group.get('lr', 0.0)) == 0.0 for group in groups)
    return bool(gradients) and idle and not state and not any(bool(g.any()) for g in gradients)

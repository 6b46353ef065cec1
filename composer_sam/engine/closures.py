"""The closure given to ``optimizer.step``, which the engine calls once per pass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from composer_sam.engine.pass_number import PassNumber
from composer_sam.engine.rule import Pass

__all__ = ['Closure', 'makes_state']


class Closure:
    """A closure that evaluates the loss and calls backward, once for every pass.

    Args:
        function: the user's closure, called without arguments, or with the number of the pass if it takes one.

    Attributes:
        checks_gradients: whether the closure itself checks every pass's gradient on all ranks, so that the engine need
            not; it then returns None where the gradient overflowed.
    """

    checks_gradients = False

    def __init__(self, function: Callable[..., Any]):
        self.function: Callable[..., Any] = function if torch.is_grad_enabled() else torch.enable_grad()(function)

    def __call__(self, request: Pass, index: int) -> Any:
        """Return the loss of one pass, or None if its gradient overflowed and the step must be skipped.

        Args:
            request: the pass to evaluate; the weights are in place.
            index: the number of the pass, from 0.

        Raises:
            ValueError: the closure returned no loss.
        """
        takes_pass = self._takes_pass
        if request.fraction < 1 and not takes_pass:
            raise ValueError(
                f'ascent_fraction={request.fraction} needs a closure that takes the pass: def closure(number): and '
                'computes the loss of number.part(batch)'
            )
        loss = self.function(PassNumber(index, request.fraction)) if takes_pass else self.function()
        if loss is None:
            raise ValueError('the closure returned None: it must return the loss it called backward() on')
        return loss

    @functools.cached_property
    def _takes_pass(self) -> bool:
        return _takes_argument(self.function)

    def unsynchronised(self, ddp: DistributedDataParallel) -> AbstractContextManager[None]:
        """Return the context in which the closure's backward does not average gradients over ranks."""
        return ddp.no_sync()


def makes_state(groups: list[dict[str, Any]], state: Any) -> bool:
    """Return whether a step without a closure only creates a fresh optimizer's state.

    torch.distributed.checkpoint creates the state this way, by one step with zero gradients at lr 0.
    """
    gradients = [p.grad for group in groups for p in group['params'] if p.grad is not None]
    idle = all(float(group.get('lr', 0.0)) == 0.0 for group in groups)
    return bool(gradients) and idle and not state and not any(bool(g.any()) for g in gradients)


def _takes_argument(function: Callable[..., Any]) -> bool:
    """Return whether the function must be given one argument."""
    if type(function) is FunctionType and not vars(function):  # most are; a signature takes as long as a small step
        return function.__code__.co_argcount > len(function.__defaults__ or ())
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables of C have no signature
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)

"""Checks of the arguments of all diagnostics, and the errors they raise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from composer_sam.engine.wrappers import is_fsdp
from composer_sam.vectors.layout import is_dtensor

__all__ = [
    'Loss',
    'NotConvergedError',
    'NotFiniteError',
    'check_at_least',
    'check_between',
    'check_count',
    'check_model',
    'check_pair',
    'check_parameters',
    'check_positive',
    'checked_loss',
]

Loss: TypeAlias = Callable[[Any, Any], Tensor]


class NotFiniteError(ValueError):
    """A loss, a gradient or a Hessian product is NaN or infinite."""


class NotConvergedError(RuntimeError):
    """An iteration ended before its tolerance was reached."""


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def check_count(name: str, count: object) -> None:
    """Raise ValueError for anything but None and an integer >= 1."""
    if count is not None and (not _is_integer(count) or count < 1):
        raise ValueError(f'{name} must be an integer >= 1 or None, got {count!r}')


def check_at_least(name: str, number: object, least: int) -> None:
    """Raise ValueError for anything but an integer >= ``least``."""
    if not _is_integer(number) or number < least:
        raise ValueError(f'{name} must be an integer >= {least}, got {number!r}')


def check_between(name: str, number: object, least: int, most: int) -> None:
    """Raise ValueError for anything but an integer from ``least`` to ``most``."""
    if not _is_integer(number) or not least <= number <= most:
        raise ValueError(f'{name} must be an integer in [{least}, {most}], got {number!r}')


def check_positive(name: str, number: object) -> None:
    """Raise ValueError for anything but a finite number > 0."""
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < float('inf'):
        raise ValueError(f'{name} must be a finite number > 0, got {number!r}')


def checked_loss(model: nn.Module, loss: Loss | None) -> Loss | None:
    """Return the loss function of a plain module, or None for a Composer model.

    A Composer model is recognised by its methods ``loss`` and ``eval_forward``.

    Raises:
        ValueError: a loss for a Composer model, no loss for a plain module, or a loss that is a sum over the batch.
    """
    if hasattr(model, 'loss') and hasattr(model, 'eval_forward'):
        if loss is not None:
            raise ValueError(
                'loss must be None for a Composer model, whose own loss is measured; for another loss pass the module '
                'inside it and batches of (inputs, targets)'
            )
        return None
    if not callable(loss):
        raise ValueError(
            f'loss must be a function of outputs and targets, such as torch.nn.functional.cross_entropy, got {loss!r}; '
            'only a Composer model brings its own'
        )
    if getattr(loss, 'reduction', 'mean') == 'sum':
        raise ValueError("loss must be a mean over the batch, got reduction='sum': make it reduction='mean'")
    return loss


def check_model(model: nn.Module) -> None:
    """Raise ValueError for a model with sharded parameters, or with DistributedDataParallel inside."""
    for module in model.modules():
        if is_fsdp(module) or any(is_dtensor(parameter) for parameter in module.parameters(recurse=False)):
            raise ValueError(
                f'{type(module).__name__} holds parameters sharded over processes (FSDP or DTensor), which cannot be '
                'differentiated twice: save a full checkpoint and load it into the plain model in one process'
            )
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                'DistributedDataParallel lies inside the model: wrap the whole model, or pass it unwrapped'
            )


def check_pair(batch: object) -> None:
    """Raise ValueError for a batch that is not ``(inputs, targets)``, which a loss of two arguments needs."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f'{type(batch).__name__} of {len(batch)}' if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise ValueError(
            f'batches must be an iterable of (inputs, targets), got a {got} in it: write [(inputs, targets)] for one '
            'batch'
        )


def check_parameters(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError for a model without trainable parameters, or with parameters in half precision."""
    if not named:
        raise ValueError('the model has no parameter that requires a gradient: nothing to differentiate')
    for name, parameter in named:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f'parameter {name!r} is {parameter.dtype}, whose rounding errors hide differences of the loss: measure '
                'a copy in float32, copy.deepcopy(model).float()'
            )

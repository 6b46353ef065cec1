"""torch's multi-tensor functions, which have no public names: one call for many tensors. Lists may be empty."""

# pyright: reportPrivateUsage=false
# Only this file uses them; torch's own optimizers use the same functions.

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    'Factor',
    'absolute',
    'add',
    'add_',
    'copy_',
    'flatten',
    'multiply',
    'multiply_',
    'norm',
    'sign',
    'split',
    'unflatten',
]

# One number for all tensors, or one tensor for each.
Factor: TypeAlias = float | Tensor | list[Tensor]


# torch refuses empty lists, which occur on a rank whose shards are all empty.


def multiply(values: list[Tensor], by: Factor) -> list[Tensor]:
    """Return ``values * by``."""
    return list(torch._foreach_mul(values, by)) if values else []


def multiply_(values: list[Tensor], by: Factor) -> None:
    """Multiply in place."""
    if values:
        torch._foreach_mul_(values, by)


def add(values: list[Tensor], others: list[Tensor], alpha: float = 1.0) -> list[Tensor]:
    """Return ``values + alpha * others``."""
    return list(torch._foreach_add(values, others, alpha=alpha)) if values else []


def add_(values: list[Tensor], others: list[Tensor] | float, alpha: float = 1.0) -> None:
    """Add ``alpha * others`` in place."""
    if not values:
        return
    if isinstance(others, (int, float)):
        torch._foreach_add_(values, alpha * others)
    else:
        torch._foreach_add_(values, others, alpha=alpha)


def copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy the sources into the targets."""
    if targets:
        torch._foreach_copy_(targets, sources)


def absolute(values: list[Tensor]) -> list[Tensor]:
    """Return the magnitude of every element."""
    return list(torch._foreach_abs(values)) if values else []


def sign(values: list[Tensor]) -> list[Tensor]:
    """Return the sign of every element: -1, 0 or 1."""
    return list(torch._foreach_sign(values)) if values else []


def reciprocal(values: list[Tensor]) -> list[Tensor]:
    """Return 1 / value for every element."""
    return list(torch._foreach_reciprocal(values)) if values else []


def norm(values: list[Tensor], order: float = 2, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return the norm of every tensor, accumulated in ``dtype``."""
    return list(torch._foreach_norm(values, order, dtype=dtype)) if values else []


def flatten(values: list[Tensor]) -> Tensor:
    """Return a copy of all tensors, of one device and data type, as one long tensor."""
    together = torch._C._nn.flatten_dense_tensors(values)
    return together.clone() if len(values) == 1 else together  # torch does not copy a single one


def unflatten(together: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Return the pieces of what :func:`flatten` returned, with the shapes of ``like``; they share its memory."""
    return list(torch._C._nn.unflatten_dense_tensors(together, like))


def split(together: Tensor, sizes: list[int]) -> list[Tensor]:
    """Return consecutive pieces of the sizes given, which share the tensor's memory."""
    return list(together.split(sizes))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]

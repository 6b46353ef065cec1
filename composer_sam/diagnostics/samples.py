"""Batches of any nesting as numbers of samples: counted, cut and put together anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ['on', 'read', 'regrouped']


def _mapped(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch with every tensor in it replaced; mappings of any kind become dictionaries."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _mapped(function, item) for key, item in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, '_fields'):
        return type(batch)(*(_mapped(function, item) for item in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_mapped(function, item) for item in batch)
    return batch


def _size(batch: Any) -> int:
    """How many samples a batch holds.

    Raises:
        ValueError: its tensors' first dimensions differ, or it holds no tensor of samples.
    """
    sizes: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        if tensor.dim():
            sizes.add(len(tensor))
        return tensor

    _mapped(note, batch)
    if len(sizes) != 1:
        found = f'first dimensions {sorted(sizes)}' if sizes else f'no tensor with samples in a {type(batch).__name__}'
        raise ValueError(f'the first dimension of every tensor of a batch must be its samples, got {found}')
    return sizes.pop()


def _cut(batch: Any, start: int, end: int) -> Any:
    """The samples from ``start`` to before ``end``, sharing the batch's memory."""
    return _mapped(lambda tensor: tensor[start:end] if tensor.dim() else tensor, batch)


def read(batches: Iterable[Any], samples: int | None, microbatch: int | None) -> list[tuple[Any, int]]:
    """The first ``samples`` samples as batches of at most ``microbatch``, each with its size. Reads no further batch
    when it has enough."""
    found: list[tuple[Any, int]] = []
    left = samples
    for batch in batches:
        size = _size(batch)
        taken = size if left is None else min(size, left)
        step = microbatch or taken or 1
        for start in range(0, taken, step):
            end = min(start + step, taken)
            found.append((batch if end - start == size else _cut(batch, start, end), end - start))
        if left is not None:
            left -= taken
            if not left:
                break
    return found


def regrouped(batches: Iterable[tuple[Any, int]], size: int) -> Iterator[list[Any]]:
    """All samples in their order, ``size`` at a time: each group as pieces of the batches it comes from. The last group
    may be smaller."""
    group: list[Any] = []
    missing = size
    for batch, length in batches:
        start = 0
        while start < length:
            end = min(start + missing, length)
            group.append(_cut(batch, start, end))
            missing -= end - start
            start = end
            if not missing:
                yield group
                group, missing = [], size
    if group:
        yield group


def on(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``."""
    return _mapped(lambda tensor: tensor.to(device, non_blocking=True), batch)

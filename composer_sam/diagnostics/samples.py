"""Counting, cutting and regrouping the samples of batches of any nesting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ['on', 'read', 'regrouped']


def _mapped(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Return the batch with every tensor replaced; mappings of any kind become dictionaries."""
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
    """Return the number of samples in a batch.

    Raises:
        ValueError: the first dimensions of the tensors differ, or there is no tensor of samples.
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
    """Return the samples from ``start`` up to, not including, ``end``; they share the memory of the batch."""
    return _mapped(lambda tensor: tensor[start:end] if tensor.dim() else tensor, batch)


def read(
    batches: Iterable[Any],
    samples: int | None,
    microbatch: int | None,
    check: Callable[[object], None] | None = None,
) -> list[tuple[Any, int]]:
    """Return the first ``samples`` samples as batches of at most ``microbatch`` samples, each with its size.

    No further batch is read once there are enough samples.

    Args:
        batches: batches of samples.
        samples: the largest number of samples; all if None.
        microbatch: the largest number of samples in a returned batch; that of the given batch if None.
        check: raises ValueError for a batch of the wrong form.
    """
    found: list[tuple[Any, int]] = []
    left = samples
    for batch in batches:
        if check is not None:
            check(batch)
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
    """Yield all samples in their order in groups of ``size``; the last group may be smaller.

    A group is a list of pieces of the batches it comes from.
    """
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
    """Return the batch with its tensors on ``device``."""
    return _mapped(lambda tensor: tensor.to(device, non_blocking=True), batch)

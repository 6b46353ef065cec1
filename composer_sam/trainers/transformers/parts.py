"""The part of a batch that a pass with ``ascent_fraction`` sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor

from composer_sam.engine.pass_number import part_size

__all__ = ['first_samples']


def first_samples(batch: Any, fraction: float) -> Any:
    """Return the first samples of a batch, rounded up.

    Args:
        batch: a mapping (BatchEncoding, and mappings in it) or a sequence, of tensors and lists with one entry per
            sample. Numbers, strings and tensors without dimensions stay as they are.
        fraction: the part of the samples.

    Raises:
        ValueError: the entries have different lengths, so that some are not one per sample.
    """
    if fraction == 1:
        return batch
    whole = _named(batch)
    sizes = dict(_sizes(whole))
    if len(set(sizes.values())) != 1:
        found = ', '.join(f'{name}: {size}' for name, size in sizes.items()) or f'none in a {type(batch).__name__}'
        raise ValueError(
            f'ascent_fraction={fraction} takes the first samples of every tensor and list of a batch, so each must '
            f'have one entry per sample, but their lengths are {found}. Pad the samples instead of joining them, or '
            'use ascent_fraction=1'
        )
    cut = _cut(whole, part_size(fraction, next(iter(sizes.values()))))
    return cut if isinstance(batch, Mapping) else type(batch)(cut.values())


def _named(batch: Any) -> Mapping[Any, Any]:
    """Return a batch as a mapping; an empty one for what is neither a mapping nor a sequence of tensors."""
    if isinstance(batch, Mapping):
        return cast(Mapping[Any, Any], batch)
    if not isinstance(batch, (list, tuple)):
        return {}
    items = list(cast(Iterable[Any], batch))
    return dict(enumerate(items)) if all(isinstance(item, Tensor) for item in items) else {}


def _sizes(entries: Mapping[Any, Any]) -> Iterable[tuple[str, int]]:
    """Yield the names and lengths of what is cut."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _sizes(cast(Mapping[Any, Any], value))
        elif _is_cut(value):
            yield str(name), len(value)


def _cut(entries: Any, size: int) -> Any:
    kind = cast(Any, type(entries))  # made as the Trainer itself makes it when it moves a batch to its device
    return kind({name: _cut_entry(value, size) for name, value in entries.items()})


def _cut_entry(value: Any, size: int) -> Any:
    if isinstance(value, Mapping):
        return _cut(value, size)
    return value[:size] if _is_cut(value) else value


def _is_cut(value: object) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim() > 0)

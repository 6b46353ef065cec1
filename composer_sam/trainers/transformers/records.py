"""The control of what a Trainer counts in its attributes while it evaluates batches."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias, cast

from torch import Tensor

from composer_sam.engine.controls import Snapshots

__all__ = ['RecordsControl']

_PutBack: TypeAlias = Callable[[], Any]
_Records: TypeAlias = list[dict[str, _PutBack]]
_DATASETS = frozenset(('train_dataset', 'eval_dataset'))  # they may be long lists, and are not records


class RecordsControl(Snapshots[_Records]):
    """The control of what objects keep in plain attributes: counters, metrics, and lists of them.

    It covers which objects the attributes are, the contents of lists, deques and sets, of dictionaries and of what is
    in them, and tensors of one number. Every pass begins with the records that the first one began with; after the
    step they are those of the pass that counts.

    Args:
        *objects: the objects.
    """

    def __init__(self, *objects: Any):
        self._attributes: list[dict[str, Any]] = [vars(thing) for thing in objects]
        super().__init__()

    def discard(self) -> None:
        self.settle()

    def _read(self) -> _Records:
        return [
            {name: _saved(value) for name, value in attributes.items() if name not in _DATASETS}
            for attributes in self._attributes
        ]

    def _write(self, saved: _Records) -> None:
        for attributes, before in zip(self._attributes, saved, strict=True):
            for name in attributes.keys() - before.keys() - _DATASETS:
                del attributes[name]
            attributes.update((name, put_back()) for name, put_back in before.items())


def _saved(value: Any) -> _PutBack:
    """Return a function that puts the contents of a value back, and returns the value."""
    if isinstance(value, dict):
        items = cast(dict[Any, Any], value)
        return functools.partial(_fill_dictionary, items, {key: _saved(item) for key, item in items.items()})
    if isinstance(value, (list, deque, set)):
        filled = cast(Any, value)
        return functools.partial(_fill, filled, filled.update if isinstance(value, set) else filled.extend, [*filled])
    if isinstance(value, Tensor) and value.numel() == 1 and not (value.requires_grad or value.is_inference()):
        return functools.partial(value.copy_, value.clone())
    return lambda: value


def _fill_dictionary(value: dict[Any, Any], contents: dict[Any, _PutBack]) -> dict[Any, Any]:
    value.clear()
    value.update((key, put_back()) for key, put_back in contents.items())
    return value


def _fill(value: Any, add: Callable[[list[Any]], object], contents: list[Any]) -> Any:
    value.clear()
    add(contents)
    return value

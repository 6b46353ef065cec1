"""The control of what modules keep of their forwards in plain attributes: counters, masks, hidden states, caches."""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Iterable, Iterator, MutableMapping
from types import FunctionType, MethodType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from composer_sam.engine.wrappers import script_attributes

__all__ = ['AttributeControl']

log = logging.getLogger(__name__)

_Attributes: TypeAlias = MutableMapping[str, Any]
# A value, and for a container its contents, each saved likewise.
_Saved: TypeAlias = tuple[Any, Any]

_OWN = frozenset(vars(nn.Module()))  # torch's own attributes of every module
_DEEPEST = 6  # containers within containers are followed so far
# What most attributes are: nothing to look into, and no time to lose with.
_LEAVES = frozenset(
    (bool, int, float, str, type(None), type, torch.device, torch.dtype, nn.Parameter, FunctionType, MethodType)
)
_told: set[tuple[str, str]] = set()


class AttributeControl:
    """The control of plain attributes that modules set in their forward.

    It covers modules whose ``forward`` is not torch's own, attributes of every kind, and the contents of lists, tuples,
    dictionaries and dataclasses in them; attributes that the first pass creates are taken away before the next. What is
    changed inside another object cannot be seen. A tensor that the first pass changes in place cannot be put back: that
    is said once, with the attribute's name.

    Args:
        modules: all modules of the model.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self._noted = [_Noted(type(m).__name__, _attributes(m)) for m in modules if not _is_torchs(m)]
        # For every module that the first pass changed: what it had before, and what after.
        self._changed: list[tuple[_Noted, _Noted]] = []
        self._done = False

    def leave_out(self) -> None:
        """Do nothing: until the first pass is done, all attributes are put back."""

    def first_pass_done(self) -> None:
        self._done = True
        for noted in self._noted:
            if not noted.holds():
                self._changed.append((noted, _Noted(noted.kind, noted.attributes)))
            for name, tensor, version in noted.versions:
                if tensor._version != version and (noted.kind, name) not in _told:
                    _told.add((noted.kind, name))
                    log.warning(
                        'The forward of %s changes the tensor in its attribute %r in place, so further passes of a '
                        'step see the changed one. Register it as a buffer, or assign a new tensor. Reported once.',
                        noted.kind,
                        name,
                    )

    def rewind(self) -> None:
        if not self._done:
            self.rollback()
        for before, _ in self._changed:
            before.put_back()

    def settle(self) -> None:
        for _, after in self._changed:
            after.put_back()

    def discard(self) -> None:
        self.rewind()

    def rollback(self) -> None:
        for noted in self._noted:
            noted.put_back()


class _Noted:
    """The attributes of a module at one moment, and what the containers among them hold.

    Args:
        kind: the name of the module's class.
        attributes: the module's attributes.

    Attributes:
        versions: the tensors among them, with the names of the attributes that they are in, and their versions.
    """

    def __init__(self, kind: str, attributes: _Attributes):
        self.kind = kind
        self.attributes = attributes
        self.versions: list[tuple[str, Tensor, int]] = []
        self._values = dict(attributes)
        self._contents: dict[str, _Saved] = {}
        for name, value in self._values.items():
            if type(value) in _LEAVES or name in _OWN:
                continue
            tensors: list[Tensor] = []
            saved = _saved(value, tensors)
            if saved[1] is not None:
                self._contents[name] = saved
            self.versions += [(name, tensor, tensor._version) for tensor in tensors]

    def holds(self) -> bool:
        """Return whether the attributes are the same now, with the same contents."""
        now, then = self.attributes, self._values
        return (
            len(now) == len(then)
            and all(map(operator.is_, now.values(), then.values()))
            and list(now) == list(then)
            and all(_unchanged(saved, then[name]) for name, saved in self._contents.items())
        )

    def put_back(self) -> None:
        """Give the module these attributes and no others, with these contents."""
        for name in [name for name in self.attributes if name not in _OWN and name not in self._values]:
            del self.attributes[name]
        for name, value in self._values.items():
            if name not in _OWN:
                self.attributes[name] = _put(self._contents[name]) if name in self._contents else value


def _is_torchs(module: nn.Module) -> bool:
    """Return whether a module's forward is torch's own, which keeps nothing in plain attributes."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return (getattr(type(module).forward, '__module__', None) or '').startswith('torch.')


def _attributes(module: nn.Module) -> _Attributes:
    return _ScriptAttributes(module) if isinstance(module, torch.jit.ScriptModule) else vars(module)


class _ScriptAttributes(MutableMapping[str, Any]):
    """The attributes of a TorchScript module, which it keeps itself; none can be added or removed."""

    def __init__(self, module: torch.jit.ScriptModule):
        self._module = module
        self._names = script_attributes(module)

    def __getitem__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f'the attribute {name!r} of a TorchScript module cannot be removed')

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _saved(value: Any, tensors: list[Tensor], depth: int = 0) -> _Saved:
    """Save a value; the tensors that are in it, and could be changed in place, are added to ``tensors``."""
    if type(value) in _LEAVES:
        return value, None
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter) and not value.is_inference():
            tensors.append(value)
        return value, None
    if depth == _DEEPEST:
        return value, None
    if _is_sequence(value):
        return value, [_saved(item, tensors, depth + 1) for item in value]
    held = _held(value)
    return value, None if held is None else {key: _saved(item, tensors, depth + 1) for key, item in held.items()}


def _is_sequence(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _held(value: Any) -> dict[Any, Any] | None:
    """Return what a dictionary or a dataclass holds; None for anything else."""
    if isinstance(value, dict):
        return cast(dict[Any, Any], value)
    is_instance = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return getattr(value, '__dict__', None) if is_instance else None


def _unchanged(saved: _Saved, value: Any) -> bool:
    """Return whether the value is the one that was saved, with the same contents."""
    was, contents = saved
    if value is not was:
        return False
    if contents is None:
        return True
    if _is_sequence(value):
        return len(value) == len(contents) and all(_unchanged(*pair) for pair in zip(contents, value, strict=True))
    held = _held(value) or {}
    return held.keys() == contents.keys() and all(_unchanged(contents[key], held[key]) for key in held)


def _put(saved: _Saved) -> Any:
    """Put the contents of a container back where they were, in place, and return the value."""
    value, contents = saved
    if isinstance(contents, list):
        items = [_put(item) for item in cast(list[_Saved], contents)]
        if isinstance(value, list):
            cast(list[Any], value)[:] = items
    elif contents is not None and (held := _held(value)) is not None:
        pairs = {key: _put(item) for key, item in contents.items()}
        held.clear()
        held.update(pairs)
    return cast(Any, value)

"""Finds a component by its name and checks its arguments against its signature, before anything is built."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from composer.core import Time
from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from composer_sam.methods.window import TimeLike
from composer_sam.recipes.errors import RecipeError, unknown

__all__ = ['canonical', 'check_arguments', 'check_time', 'classes', 'construct', 'find']


def canonical(name: str) -> str:
    """The form in which names are compared: ``gradient_clipping``, ``GradientClipping`` are the same."""
    return name.replace('_', '').replace('-', '').lower()


def classes(*modules: ModuleType, of: type, suffix: str = '') -> dict[str, type]:
    """The public concrete subclasses of ``of`` in ``modules`` by name without ``suffix``; the first module wins."""
    found: dict[str, type] = {}
    for module in modules:
        for name in getattr(module, '__all__', dir(module)):
            member = getattr(module, name)
            if inspect.isclass(member) and issubclass(member, of) and member is not of:
                found.setdefault(name.removesuffix(suffix), member)
    return found


def find(key: str, name: Any, available: Mapping[str, type]) -> type:
    """The class called ``name``, ignoring case and underscores."""
    if not isinstance(name, str):
        raise RecipeError(f'{key}: must be a name, got {name!r}')
    for candidate, found in available.items():
        if canonical(name) in (canonical(candidate), canonical(found.__name__)):
            return found
    raise unknown('name', key, name, name, available)


def check_arguments(
    key: str,
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
    provided: Iterable[str] = (),
) -> dict[str, Any]:
    """Checks the ``arguments`` at the dotted ``key`` against the signature of ``target``.

    Args:
        key: Where the arguments stand in the recipe, for the error.
        target: What will be called with them.
        arguments: What the recipe gives.
        provided: Parameters that are filled in by the program and so not open to the recipe.

    Returns:
        The arguments, with lists made tuples where the signature asks for tuples.
    """
    closed = set(provided)
    parameters = {name: p for name, p in inspect.signature(target).parameters.items() if name not in closed}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    hints = _hints(target)
    checked = {}
    for name, value in arguments.items():
        if name in closed:
            raise RecipeError(f'{key}.{name}: is filled in by the recipe itself and cannot be set (value {value!r})')
        if name not in named and not takes_any:
            raise unknown('key', f'{key}.{name}', value, str(name), named)
        checked[name] = _check_type(f'{key}.{name}', value, hints[name]) if name in hints else value
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in arguments:
            raise RecipeError(f'{key}.{name}: is required by {getattr(target, "__name__", target)}')
    return checked


def construct(key: str, target: Callable[..., Any], /, *positional: Any, **arguments: Any) -> Any:
    """Calls ``target``; what its constructor refuses becomes an error at the dotted ``key``."""
    try:
        return target(*positional, **arguments)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise RecipeError(f'{key}: {error}') from error


def check_time(key: str, value: int | str) -> None:
    """Checks that a string is one of Composer's durations, such as ``90ep`` or ``0.5dur``."""
    if isinstance(value, str):
        try:
            Time.from_timestring(value)
        except (ValueError, TypeError):
            raise RecipeError(f"{key}: {value!r} is not a duration; write '90ep', '500ba' or '0.5dur'") from None


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """The evaluated annotations of a signature.

    Those of a dataclass are read off the class, as inherited fields must be evaluated in the module that declares
    them. Annotations that exist for type checkers alone cannot be evaluated; the constructor is then the only judge.
    """
    source = target if dataclasses.is_dataclass(target) or not inspect.isclass(target) else target.__init__
    try:
        return typing.get_type_hints(source)
    except (NameError, TypeError):
        return {}


def _check_type(key: str, value: Any, hint: Any) -> Any:
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True))
    except (PydanticSchemaGenerationError, PydanticUserError):
        return value  # an annotation beyond what can be checked: the constructor is the judge
    for candidate in (value, tuple(value)) if isinstance(value, list) else (value,):
        try:
            checked = adapter.validate_python(candidate)
        except ValidationError:
            continue
        if any(arg in (Time, TimeLike) or typing.get_origin(arg) is Time for arg in typing.get_args(hint)):
            check_time(key, checked)
        return checked
    name = hint.__name__ if inspect.isclass(hint) else str(hint).replace('typing.', '')
    raise RecipeError(f'{key}: {value!r} is of the wrong type, expected {name}')

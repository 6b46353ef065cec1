"""Options that several functions take as keywords, declared once as a dataclass."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ['keywords_of']

F = TypeVar('F', bound=Callable[..., Any])


def keywords_of(options: type[Any]) -> Callable[[F], F]:
    """Replace ``**options`` in the signature of a function by the fields of a dataclass.

    The function itself still receives a dictionary and passes it to the dataclass, which checks it. Only what
    ``help``, :func:`inspect.signature` and :func:`typing.get_type_hints` return changes.

    Args:
        options: a dataclass; all its fields have defaults.

    Example:
        >>> import dataclasses, inspect
        >>> @dataclasses.dataclass
        ... class Size:
        ...     width: int = 1
        >>> @keywords_of(Size)
        ... def area(height: int, **options) -> int:
        ...     return height * Size(**options).width
        >>> list(inspect.signature(area).parameters)
        ['height', 'width']
        >>> area(2, width=3)
        6
    """
    hints = typing.get_type_hints(options)

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        (collected,) = signature.parameters.keys() - {p.name for p in own}
        fields = [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
            for field in dataclasses.fields(options)
        ]
        function.__annotations__ = {k: v for k, v in function.__annotations__.items() if k != collected} | {
            field.name: field.annotation for field in fields
        }
        function.__signature__ = signature.replace(parameters=[*own, *fields])  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return decorate

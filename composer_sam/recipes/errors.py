"""The one exception a recipe raises, and how it names what would have worked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = ['RecipeError', 'nearest', 'unknown']


class RecipeError(ValueError):
    """A mistake in a recipe: one line naming the dotted key, the value and what would be valid."""

    def __init__(self, message: str) -> None:
        super().__init__(' '.join(message.split()))


def nearest(name: str, valid: Iterable[str]) -> str:
    """Phrases which of the ``valid`` names were probably meant by ``name``; all of them where none is close."""
    names = sorted(valid)
    lowered = {candidate.lower(): candidate for candidate in names}
    close = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)]
    if close:
        return f'did you mean {" or ".join(close)}?'
    return f'valid: {", ".join(names)}' if names else 'none is accepted here'


def unknown(kind: str, key: str, value: Any, name: str, valid: Iterable[str]) -> RecipeError:
    """The error for a ``name`` that is not among the ``valid`` ones, found at the dotted ``key``."""
    return RecipeError(f'{key}: unknown {kind} (value {value!r}); {nearest(name, valid)}')

"""The error of a mistake in a recipe, and the suggestion of valid names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ['RecipeError', 'nearest', 'unknown']


class RecipeError(ValueError):
    """A mistake in a recipe: one line with the dotted key, the value and what would be valid."""

    def __init__(self, message: str) -> None:
        super().__init__(' '.join(message.split()))


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a suggestion of the valid names that are similar to ``name``, or of all of them if none is similar."""
    names = sorted(valid)
    lowered = {candidate.lower(): candidate for candidate in names}
    close = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)]
    if close:
        return f'did you mean {" or ".join(close)}?'
    return f'valid: {", ".join(names)}' if names else 'none is accepted here'


def unknown(kind: str, key: str, value: object, name: str, valid: Iterable[str]) -> RecipeError:
    """Return the error for an unknown name.

    Args:
        kind: the kind of name, for the message.
        key: the dotted key at which it stands.
        value: the value of the key.
        name: the unknown name.
        valid: the names that would be valid.
    """
    return RecipeError(f'{key}: unknown {kind} (value {value!r}); {nearest(name, valid)}')

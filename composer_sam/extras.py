"""What is not installed is one line that names the extra to install."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ['extra']


@contextlib.contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Around imports of an optional dependency.

    Args:
        name: the extra that installs it.
        what: what needs it.

    Raises:
        ModuleNotFoundError: it is not installed; the message names the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs {error.name}, which is not installed: pip install 'composer-sam[{name}]'", name=error.name
        ) from error

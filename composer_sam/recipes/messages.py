"""Warnings and log messages as lines of their own."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ['messages']

# Warnings that a user of a recipe can do nothing about.
_KNOWN = (
    r'Using backward\(\) with create_graph=True',  # SGDHess keeps the graph, and frees it at the end of the step
    r'Cannot split tensor of length',  # the last batch of a test of text is smaller than the others
    # A checkpoint of another command.
    r'(Divergence|History|Preemption|Progress|Report|Curves) is not in the state_dict',
)


@contextmanager
def messages(write: Callable[[str], None] | None) -> Iterator[None]:
    """Hand every warning and every log message in this context to ``write`` as one line.

    Args:
        write: called with the line; None on all ranks but the first, where only errors are printed.
    """
    handler = _Lines(write)
    root = logging.getLogger()
    with warnings.catch_warnings():
        for pattern in _KNOWN:
            warnings.filterwarnings('ignore', message=pattern)

        def show(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
            if write is not None:
                place = '/'.join(Path(filename).parts[-2:])
                write(_one_line(f'warning: {message} ({category.__name__}, {place}:{lineno})'))

        warnings.showwarning = show
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)


class _Lines(logging.Handler):
    """Hands every record to ``write`` as one line; without ``write`` errors only, to stderr."""

    def __init__(self, write: Callable[[str], None] | None) -> None:
        super().__init__(logging.NOTSET if write is not None else logging.ERROR)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        cause = '' if error is None else f': {type(error).__name__}: {error}'
        line = _one_line(f'{record.levelname.lower()}: {record.getMessage()}{cause}')
        if self._write is not None:
            self._write(line)
        else:
            print(line, file=sys.stderr)


def _one_line(text: str) -> str:
    return ' '.join(text.split())

"""Whether Python's garbage collector is at work.

A step that is left open with its optimizer is undone when the collector finds both, at any time later: it puts the
weights back, but must leave the random streams alone. Others draw from them by then, and the collector may run while
torch holds the lock of the very stream.
"""

from __future__ import annotations

import gc
import threading
from typing import Any

__all__ = ['collecting']

_threads: set[int] = set()


def collecting() -> bool:
    """Return whether the collector is what calls, in this thread."""
    return threading.get_ident() in _threads


def _note(phase: str, info: dict[str, Any]) -> None:
    del info
    (_threads.add if phase == 'start' else _threads.discard)(threading.get_ident())


gc.callbacks.append(_note)

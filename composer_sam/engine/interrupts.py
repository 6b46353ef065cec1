"""Interrupts held back while weights, optimizer state and counters change together."""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ['InterruptsHeld']

# What may raise in the middle of a step: Ctrl-C, and what clusters and timeouts send. Windows lacks some of them.
_NAMES = ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGALRM', 'SIGUSR1', 'SIGUSR2')
_fast: Any = _signal  # signal without its enumerations, which take longer than all else here
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class InterruptsHeld:
    """A context that a signal cannot leave half done: its handler is called when the context ends.

    Only the first signal waits. A second one is handled at once, so that what hangs inside can be interrupted. Contexts
    can be nested; the outermost one holds the signals. Outside the main thread it does nothing, because Python calls
    signal handlers in the main thread only.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._arrived: tuple[int, FrameType | None] | None = None
        self._holding = False

    def __enter__(self) -> InterruptsHeld:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._holding = True
        try:
            for number in _SIGNALS:
                handler = _fast.getsignal(number)
                if callable(handler) and not _holds(handler):
                    self._handlers[number] = handler
                    _fast.signal(number, self._hold)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._release()
        if self._arrived is not None:
            number, frame = self._arrived
            self._handlers[number](number, frame)

    def _release(self) -> None:
        self._holding = False  # from here on a handler that is still ours passes signals on
        for number, handler in self._handlers.items():
            _fast.signal(number, handler)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._holding and self._arrived is None:
            self._arrived = number, frame
        else:
            self._handlers[number](number, frame)


def _holds(handler: object) -> bool:
    """Return whether the handler is that of an outer context that is still holding."""
    context = getattr(handler, '__self__', None)
    return isinstance(context, InterruptsHeld) and context._holding  # pyright: ignore[reportPrivateUsage]

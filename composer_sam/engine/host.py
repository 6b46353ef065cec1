"""Whoever runs the training loop, as the engine sees it: a trainer, or a loop of your own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from composer_sam.engine.closures import Closure
from composer_sam.engine.controls import Control
from composer_sam.engine.moment import Moment
from composer_sam.engine.rule import Method

__all__ = ['Alone', 'Host']


class Host(Protocol):
    """What the engine asks of whoever runs the training loop.

    Attributes:
        steps_by_itself: whether the host calls ``step`` itself, so that nobody calls ``first_step``.
    """

    steps_by_itself: bool

    def check(self, method: Method) -> None:
        """Raise ValueError for what the method asks and this host cannot tell."""
        ...

    def moment(self, steps_taken: int) -> Moment:
        """When the step that is about to begin happens."""
        ...

    def closure(self, function: Callable[..., Any]) -> Closure:
        """The closure handed to ``step``, wrapped once, so that a pass can be asked of it."""
        ...

    def controls(self, closure: Closure | None) -> Sequence[Control]:
        """What of the host's own a repeated pass must not disturb: its metrics and records."""
        ...

    def passes_done(self) -> None:
        """Called once a step, when its passes are over, also of a step that is skipped."""
        ...

    def direction_found(self) -> None:
        """Called when the direction lies in the parameters' ``.grad``, before the base optimizer steps."""
        ...


class Alone:
    """The host of a plain loop: it counts steps, keeps no records, and calls an ordinary closure."""

    steps_by_itself = False

    def check(self, method: Method) -> None:
        method.check_alone()

    def moment(self, steps_taken: int) -> Moment:
        return Moment(steps_taken)

    def closure(self, function: Callable[..., Any]) -> Closure:
        return Closure(function)

    def controls(self, closure: Closure | None) -> Sequence[Control]:
        del closure
        return ()

    def passes_done(self) -> None:
        pass

    def direction_found(self) -> None:
        pass

"""The host, as the engine sees it: what runs the training loop, a trainer or a loop of your own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from composer_sam.engine.closures import Closure
from composer_sam.engine.controls import Control
from composer_sam.engine.moment import Moment
from composer_sam.engine.record import StepRecord
from composer_sam.engine.rule import Method

__all__ = ['Alone', 'Host']


class Host(Protocol):
    """The protocol between the engine and what runs the training loop.

    Attributes:
        steps_by_itself: whether the host calls ``step`` itself, so that ``first_step`` is never called.
    """

    steps_by_itself: bool

    def check(self, method: Method) -> None:
        """Raise ValueError if the method needs something that this host cannot provide."""
        ...

    def moment(self, steps_taken: int) -> Moment:
        """Return the time of the step that is about to begin."""
        ...

    def closure(self, function: Callable[..., Any]) -> Closure:
        """Wrap the closure given to ``step``, so that the engine can call it for a pass; called once per step."""
        ...

    def controls(self, closure: Closure | None) -> Sequence[Control]:
        """Return the controls of the host's own state, such as metrics and records."""
        ...

    def passes_done(self) -> None:
        """Handle the end of a step's passes; called once per step, also for a skipped step."""
        ...

    def direction_found(self) -> None:
        """Handle the direction in the parameters' ``.grad``; called before the base optimizer steps."""
        ...

    def stepped(self, method: Method, record: StepRecord) -> None:
        """Log what a step did; called when it has been taken."""
        ...


class Alone:
    """The host of a plain loop: it counts steps, keeps no records, and calls an ordinary closure."""

    steps_by_itself = False

    def check(self, method: Method) -> None:
        method.check_host(('ba',))

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

    def stepped(self, method: Method, record: StepRecord) -> None:
        pass

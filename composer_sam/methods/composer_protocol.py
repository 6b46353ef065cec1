"""The names that Composer's Trainer asks of an algorithm, so that a method can be one without Composer installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger
else:
    Algorithm = object

__all__ = ['ComposerAlgorithm']

# By name: the events' class is Composer's.
_EVENTS = ('BEFORE_LOAD', 'FIT_START', 'FIT_END')


class ComposerAlgorithm(Algorithm):
    """An algorithm of Composer's in all but name.

    Composer asks its algorithms these seven names and never for their class. To type checkers this is an ``Algorithm``,
    and from the first Trainer on it is one to ``isinstance`` too.
    """

    @property
    def find_unused_parameters(self) -> bool:
        """Whether parameters may be left without a gradient: no method does that."""
        return False

    @property
    def backwards_create_graph(self) -> bool:
        """Whether the backward must be differentiable."""
        return False

    @staticmethod
    def required_on_load() -> bool:
        """Whether a checkpoint can be loaded with the method only: it is the base optimizer's, so it needs none."""
        return False

    def match(self, event: Event, state: State) -> bool:
        """Whether :meth:`apply` has something to do at ``event``."""
        del state
        # The scaler must be there before a checkpoint's scale is loaded; the optimizer is swapped after it.
        return event.name in _EVENTS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Swap the trainer's optimizer for the wrapper around it, once, also over several fits."""
        from composer_sam.trainers.composer import attach

        attach.register(ComposerAlgorithm)
        attach.apply(self, event, state, logger)  # pyright: ignore[reportArgumentType]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint notes of the algorithm."""
        return {'repr': repr(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A method has no state of its own: what it remembers lies in the optimizer's."""
        del state

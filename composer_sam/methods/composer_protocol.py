"""The names that Composer's Trainer uses of an algorithm, so that a method can be one without Composer installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger
else:
    Algorithm = object

__all__ = ['ComposerAlgorithm']

# The events by name, because their class is in Composer.
_EVENTS = ('BEFORE_LOAD', 'FIT_START', 'FIT_END')


class ComposerAlgorithm(Algorithm):
    """A Composer algorithm that does not inherit from Composer's class.

    Composer uses these seven names of its algorithms and never checks their class. Type checkers see an ``Algorithm``;
    ``isinstance`` sees one too, from the first Trainer on.
    """

    @property
    def find_unused_parameters(self) -> bool:
        """Whether the method leaves parameters without a gradient: no method does."""
        return False

    @property
    def backwards_create_graph(self) -> bool:
        """Whether the backward must be differentiable."""
        return False

    @staticmethod
    def required_on_load() -> bool:
        """Return whether loading a checkpoint requires the method: it does not, its state is the base optimizer's."""
        return False

    def match(self, event: Event, state: State) -> bool:
        """Return whether :meth:`apply` has something to do at ``event``."""
        del state
        # The scaler must be there before a checkpoint's scale is loaded; the optimizer is swapped after it.
        return event.name in _EVENTS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the trainer's optimizer with the wrapper around it, once even over several fits."""
        from composer_sam.trainers.composer import attach

        attach.register(ComposerAlgorithm)
        attach.apply(self, event, state, logger)  # pyright: ignore[reportArgumentType]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores of the algorithm."""
        return {'repr': repr(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: a method's memory is in the optimizer's state."""
        del state

"""Composer's Trainer as the engine's host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from composer.algorithms import GradientClipping
from composer.callbacks import MemoryMonitor
from composer.core import Event, State
from composer.loggers import Logger
from composer.optim import ComposerScheduler

from composer_sam.engine.closures import Closure
from composer_sam.engine.controls import Control
from composer_sam.engine.moment import Moment
from composer_sam.engine.rule import Method
from composer_sam.trainers.composer.closure import ComposerClosure
from composer_sam.trainers.composer.records import RecordsControl

__all__ = ['ComposerHost', 'ComposerMoment']


@dataclass(frozen=True)
class ComposerMoment(Moment):
    """When a step of a Trainer happens, by the trainer's timestamp.

    Args:
        state: the trainer's state.
    """

    state: State

    def elapsed(self, unit: str) -> float:
        timestamp, length = self.state.timestamp, self.state.max_duration
        if unit != 'dur':
            return timestamp.get(unit).value
        if length is None:
            raise ValueError('a part of the run (dur) needs max_duration')
        return timestamp.get(length.unit).value / length.value

    def factor(self, schedule: Callable[[Any], float]) -> float:
        # A protocol that cannot be asked by isinstance; Composer's schedulers name it as their base.
        of_composer = ComposerScheduler in type(schedule).__mro__
        return schedule(self.state if of_composer else self.state.timestamp)


class ComposerHost:
    """What a wrapped optimizer asks its Trainer.

    Args:
        state: the trainer's state.
        logger: the trainer's logger.
    """

    steps_by_itself = True

    def __init__(self, state: State, logger: Logger):
        self._state = state
        self._logger = logger

    def check(self, method: Method) -> None:
        """Nothing: a Trainer can tell all that methods ask."""

    def moment(self, steps_taken: int) -> Moment:
        del steps_taken  # the trainer's counter is saved and restored
        return ComposerMoment(self._state.timestamp.batch.value, self._state)

    def closure(self, function: Callable[..., Any]) -> Closure:
        return ComposerClosure(function)

    def controls(self, closure: Closure | None) -> Sequence[Control]:
        return (RecordsControl(self._state, closure.microbatches),) if isinstance(closure, ComposerClosure) else ()

    def direction_found(self) -> None:
        """Clip the direction, if the trainer clips gradients."""
        for algorithm in self._state.algorithms:
            if isinstance(algorithm, GradientClipping):
                algorithm.apply(Event.AFTER_TRAIN_BATCH, self._state, self._logger)

    def passes_done(self) -> None:
        """Report the memory, if the trainer does: once for all passes."""
        for callback in self._state.callbacks:
            if isinstance(callback, MemoryMonitor):
                callback.after_train_batch(self._state, self._logger)

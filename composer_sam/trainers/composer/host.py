"""Composer's Trainer as the engine's host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from composer.algorithms import GradientClipping
from composer.callbacks import MemoryMonitor
from composer.core import Event, State, TimeUnit
from composer.loggers import Logger
from composer.optim import ComposerScheduler

from composer_sam.engine.closures import Closure
from composer_sam.engine.controls import Control
from composer_sam.engine.moment import Moment
from composer_sam.engine.record import StepRecord
from composer_sam.engine.rule import Method
from composer_sam.trainers.composer.closure import ComposerClosure
from composer_sam.trainers.composer.records import RecordsControl
from composer_sam.trainers.host import logged

__all__ = ['ComposerHost', 'ComposerMoment']


@dataclass(frozen=True)
class ComposerMoment(Moment):
    """The time of a step of a Trainer, by the trainer's timestamp.

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

    def part(self) -> float:
        timestamp, length, steps = self.state.timestamp, self.state.max_duration, self.state.dataloader_len
        if length is None or length.unit != TimeUnit.EPOCH or steps is None:
            return self.elapsed('dur')
        # A run in epochs counts whole ones only.
        return (timestamp.epoch.value + timestamp.batch_in_epoch.value / int(steps)) / length.value

    def factor(self, schedule: Callable[[Any], float]) -> float:
        # isinstance does not work with this protocol, but Composer's schedulers have it as a base class.
        of_composer = ComposerScheduler in type(schedule).__mro__
        return schedule(self.state if of_composer else self.state.timestamp)


class ComposerHost:
    """A Trainer as the host of a wrapped optimizer.

    Args:
        state: the trainer's state.
        logger: the trainer's logger.
    """

    steps_by_itself = True

    def __init__(self, state: State, logger: Logger):
        self._state = state
        self._logger = logger

    def check(self, method: Method) -> None:
        """Do nothing: a Trainer provides all that methods need."""

    def moment(self, steps_taken: int) -> Moment:
        del steps_taken  # the trainer's own counter is used: checkpoints hold it
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

    def stepped(self, method: Method, record: StepRecord) -> None:
        """Log what the step did, under the method's name; a step of the base optimizer logs its phase only."""
        if not self._logger.destinations:
            return
        self._logger.log_metrics(logged(method, record))

    def passes_done(self) -> None:
        """Report the memory once for all passes, if the trainer has a MemoryMonitor."""
        for callback in self._state.callbacks:
            if isinstance(callback, MemoryMonitor):
                callback.after_train_batch(self._state, self._logger)

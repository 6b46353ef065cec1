"""A callback that records the learning curves of a run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

__all__ = ['History', 'is_finished']


class History(Callback):
    """A callback that records the training loss of every epoch, the result of every test and the time per step.

    Attributes:
        train: the columns ``epoch`` and ``loss``, the mean loss over the steps of the epoch.
        test: the columns ``epoch``, ``accuracy`` and ``loss``.
        steps: the number of steps that this process has trained.
    """

    def __init__(self) -> None:
        self.train: dict[str, list[float]] = {'epoch': [], 'loss': []}
        self.test: dict[str, list[float]] = {'epoch': [], 'accuracy': [], 'loss': []}
        self.steps = 0
        self._losses: list[float] = []
        self._seconds: list[float] = []

    def __str__(self) -> str:
        tested = f'test accuracy {self.test["accuracy"][-1]:.2%}, test loss {self.test["loss"][-1]:.4f}'
        trained = f'{self.steps} steps of {1000 * self.seconds_per_step:.2f} ms' if self.steps else 'no further steps'
        return f'{tested} after {trained}'

    @property
    def seconds_per_step(self) -> float:
        """The mean wall-clock time of a step, with loading the batch and without testing.

        The first step, which sets up memory and threads, is left out if there are others.
        """
        counted = self._seconds[1:] or self._seconds
        return sum(counted) / len(counted) if counted else float('nan')

    def batch_end(self, state: State, logger: Logger) -> None:
        del logger
        self._losses.append(sum(state.total_loss_dict.values()))
        before = state.previous_timestamp.total_wct if state.previous_timestamp is not None else timedelta()
        self._seconds.append((state.timestamp.total_wct - before).total_seconds())
        self.steps += 1

    def epoch_end(self, state: State, logger: Logger) -> None:
        del logger
        self._close_epoch(float(state.timestamp.epoch.value))

    def fit_end(self, state: State, logger: Logger) -> None:
        del logger
        self._close_epoch(_epochs(state))

    def eval_end(self, state: State, logger: Logger) -> None:
        del logger
        accuracy, loss = _summary(state)
        self.test['epoch'].append(_epochs(state))
        self.test['accuracy'].append(accuracy)
        self.test['loss'].append(loss)

    def _close_epoch(self, epoch: float) -> None:
        if self._losses:
            self.train['epoch'].append(epoch)
            self.train['loss'].append(sum(self._losses) / len(self._losses))
            self._losses.clear()


def is_finished(state: State) -> bool:
    """Return whether training has reached its ``max_duration``."""
    return state.max_duration is not None and state.timestamp.get(state.max_duration.unit) >= state.max_duration


def _summary(state: State) -> tuple[float, float]:
    """Return the accuracy and the cross-entropy of the last test."""
    values: dict[str, Any] = state.eval_metric_values
    return float(values['MulticlassAccuracy']), float(values['CrossEntropy'])


def _epochs(state: State) -> float:
    """Return the number of trained epochs, with a fraction for the current one."""
    steps_per_epoch = len(state.train_dataloader)  # pyright: ignore[reportArgumentType]
    return state.timestamp.epoch.value + state.timestamp.batch_in_epoch.value / steps_per_epoch

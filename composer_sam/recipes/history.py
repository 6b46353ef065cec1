"""A callback that records the learning curves of a run."""

from __future__ import annotations

from datetime import timedelta

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from composer_sam.recipes.early_stopping import VALIDATION, EarlyStopping, Stop, epochs_of, is_finished, measured

__all__ = ['History', 'is_finished']


class History(Callback):
    """A callback that records the training loss of every epoch, the result of every test and the time per step.

    Attributes:
        train: the columns ``epoch`` and ``loss``, the mean loss over the steps of the epoch.
        test: the columns ``epoch``, ``accuracy`` and ``loss``.
        language: whether it is a language model; its accuracy and loss are means over tokens.
        validation: the same columns on the validation images, empty without ``early_stopping``.
        stop: the epoch that ``early_stopping`` has chosen; None without it.
        steps: the number of steps that this process has trained.
        total: the number of steps of the whole run, with those before the checkpoint from which it was resumed.
    """

    def __init__(self) -> None:
        self.train: dict[str, list[float]] = {'epoch': [], 'loss': []}
        self.test: dict[str, list[float]] = {'epoch': [], 'accuracy': [], 'loss': []}
        self.validation: dict[str, list[float]] = {'epoch': [], 'accuracy': [], 'loss': []}
        self.stop: Stop | None = None
        self.language = False
        self.steps = 0
        self.total = 0
        self._losses: list[float] = []
        self._seconds: list[float] = []

    def __str__(self) -> str:
        tested = f'test accuracy {self.accuracy:.2%}, test loss {self.loss:.4f}'
        if self.language:
            tested += f', perplexity {self.perplexity:.4g}'
        if self.stop is not None:
            tested += f' at epoch {self.stop.epoch:g}, chosen on validation images,'
        if not self.steps:
            return f'{tested} after {self.total} steps; nothing was left to do'
        earlier = f' ({self.steps} of them in this call)' if self.steps < self.total else ''
        return f'{tested} after {self.total} steps{earlier} of {1000 * self.seconds_per_step:.2f} ms'

    @property
    def accuracy(self) -> float:
        """Test accuracy at the end, or at the epoch that ``early_stopping`` has chosen."""
        return self.test['accuracy'][-1] if self.stop is None else self.stop.accuracy

    @property
    def loss(self) -> float:
        """Test loss at the end, or at the epoch that ``early_stopping`` has chosen."""
        return self.test['loss'][-1] if self.stop is None else self.stop.loss

    @property
    def perplexity(self) -> float:
        """The exponential of the test loss: among how many equally likely tokens a language model would choose."""
        return torch.tensor(self.loss).exp().item()

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
        self.total = state.timestamp.batch.value

    def epoch_end(self, state: State, logger: Logger) -> None:
        del logger
        self._close_epoch(float(state.timestamp.epoch.value))

    def fit_end(self, state: State, logger: Logger) -> None:
        del logger
        self._close_epoch(epochs_of(state))

    def eval_end(self, state: State, logger: Logger) -> None:
        del logger
        accuracy, loss = measured(state)
        self.language = 'LanguagePerplexity' in state.eval_metric_values
        self.total = state.timestamp.batch.value
        curve = self.validation if state.dataloader_label == VALIDATION else self.test
        curve['epoch'].append(epochs_of(state))
        curve['accuracy'].append(accuracy)
        curve['loss'].append(loss)
        self.stop = next((one.stop for one in state.callbacks if isinstance(one, EarlyStopping)), None)

    def _close_epoch(self, epoch: float) -> None:
        if self._losses:
            self.train['epoch'].append(epoch)
            self.train['loss'].append(sum(self._losses) / len(self._losses))
            self._losses.clear()

"""Early stopping: the network of the epoch that was the most accurate on validation images."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ['TEST', 'VALIDATION', 'EarlyStopping', 'Stop', 'epochs_of', 'is_finished', 'measured']

TEST, VALIDATION = 'eval', 'validation'  # the labels of the two evaluations
# The metrics of a classifier and of a language model, whose accuracy is over tokens.
_ACCURACY = ('MulticlassAccuracy', 'MaskedAccuracy')
_LOSS = ('CrossEntropy', 'LanguageCrossEntropy')


@dataclass(frozen=True)
class Stop:
    """The epoch at which a run is stopped, and the results there.

    Attributes:
        epoch: the number of trained epochs.
        validation: the accuracy on the validation images, in [0, 1].
        accuracy: test accuracy.
        loss: test loss.
    """

    epoch: float
    validation: float
    accuracy: float = math.nan
    loss: float = math.nan


class EarlyStopping(Callback):
    """Chooses the epoch with the highest validation accuracy, the first of several, and keeps its weights.

    The run goes on to its end; then the network gets the weights that were kept. The test results are recorded and
    play no part in the choice. All of it is part of the checkpoint, so a resumed run chooses the same one.

    Attributes:
        stop: the choice so far; None before the first evaluation.
    """

    def __init__(self) -> None:
        self.stop: Stop | None = None
        self._weights: dict[str, Tensor] = {}

    def eval_end(self, state: State, logger: Logger) -> None:
        del logger
        accuracy, loss = measured(state)
        if state.dataloader_label == VALIDATION:
            if self.stop is None or accuracy > self.stop.validation:
                self.stop = Stop(epochs_of(state), accuracy)
                self._weights = {
                    name: value.detach().to('cpu', copy=True) for name, value in _network(state).state_dict().items()
                }
        elif self.stop is not None and self.stop.epoch == epochs_of(state):
            self.stop = Stop(self.stop.epoch, self.stop.validation, accuracy, loss)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """After the last evaluation of the run, give the network the weights that were kept."""
        del logger
        self._put_back(state)

    def after_load(self, state: State, logger: Logger) -> None:
        """Do the same for a run that was finished before it was loaded."""
        del logger
        self._put_back(state)

    def state_dict(self) -> dict[str, Any]:
        return {'stop': None if self.stop is None else asdict(self.stop), 'weights': self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stop = None if state['stop'] is None else Stop(**state['stop'])
        self._weights = state['weights']

    def _put_back(self, state: State) -> None:
        if self._weights and is_finished(state):
            _network(state).load_state_dict(self._weights)


def is_finished(state: State) -> bool:
    """Return whether training has reached its ``max_duration``."""
    return state.max_duration is not None and state.timestamp.get(state.max_duration.unit) >= state.max_duration


def measured(state: State) -> tuple[float, float]:
    """Return the accuracy and the cross-entropy of the last evaluation."""
    values: dict[str, Any] = state.eval_metric_values
    accuracy, loss = (next(values[name] for name in names if name in values) for names in (_ACCURACY, _LOSS))
    return float(accuracy), float(loss)


def epochs_of(state: State) -> float:
    """Return the number of trained epochs, with a fraction for the current one."""
    # In an evaluation the loader of the state is another one.
    steps_per_epoch = len(state.train_dataloader)  # pyright: ignore[reportArgumentType]
    return state.timestamp.epoch.value + state.timestamp.batch_in_epoch.value / steps_per_epoch


def _network(state: State) -> nn.Module:
    """Return the network without the wrapper of several processes, so that a checkpoint fits any number of them."""
    return state.model.module if isinstance(state.model, DistributedDataParallel) else state.model

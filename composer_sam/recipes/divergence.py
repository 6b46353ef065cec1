"""The end of a run whose loss is not finite: one error that says where it began and what to try."""

from __future__ import annotations

import math
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from composer_sam.recipes.early_stopping import VALIDATION, measured
from composer_sam.recipes.schema import Recipe

__all__ = ['Diverged', 'Divergence']


class Diverged(RuntimeError):
    """The loss of a run is not finite: the message is one line with the step at which it began and what to try."""


class Divergence(Callback):
    """A callback that ends a run whose loss is not finite.

    It raises :class:`Diverged` after ``stop_at_nonfinite`` steps in a row whose training loss is not finite, and at the
    end of a run whose test loss (without a test, its last training loss) is not finite. Composer averages the training
    loss and the metrics over all ranks, so all ranks decide alike.

    Args:
        recipe: the recipe of the run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._since: int | None = None  # the first of the steps in a row whose loss is not finite
        self._loss = 0.0
        self._tested_at = -1
        self._test_loss = 0.0

    def batch_end(self, state: State, logger: Logger) -> None:
        del logger
        step = state.timestamp.batch.value
        self._loss = sum(state.total_loss_dict.values())
        if math.isfinite(self._loss):
            self._since = None
            return
        self._since = step if self._since is None else self._since
        most = self._recipe.stop_at_nonfinite
        if 0 < most <= step - self._since + 1:
            raise Diverged(self._message(f'training was stopped after step {step}'))

    def eval_end(self, state: State, logger: Logger) -> None:
        del logger
        if state.dataloader_label != VALIDATION:
            self._tested_at = state.timestamp.batch.value
            _, self._test_loss = measured(state)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        del logger
        self._check_test(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        del logger
        if self._tested_at == state.timestamp.batch.value:
            self._check_test(state)
        elif self._since is not None:
            raise Diverged(self._message(f'training ended at step {state.timestamp.batch.value}'))

    def state_dict(self) -> dict[str, Any]:
        return {'since': self._since, 'loss': self._loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._since, self._loss = state['since'], state['loss']

    def _check_test(self, state: State) -> None:
        if not math.isfinite(self._test_loss):
            step = state.timestamp.batch.value
            raise Diverged(self._message(f'the test loss at step {step} is {self._test_loss}'))

    def _message(self, end: str) -> str:
        began = '' if self._since is None else f'the training loss is not finite from step {self._since} on; '
        return f'{began}{end}. {_advice(self._recipe)}'


def _advice(recipe: Recipe) -> str:
    """Return what to try, with the keys and the values of the recipe."""
    lower = [f'optimizer.lr (now {recipe.optimizer["lr"]:g})' if 'lr' in recipe.optimizer else 'optimizer.lr']
    skip = ''
    for name, arguments in recipe.algorithms.items():
        radii = [key for key in arguments if 'rho' in key and isinstance(arguments[key], (int, float))]
        lower += [f'algorithms.{name}.{key} (now {arguments[key]:g})' for key in radii]
        if radii and arguments.get('on_nonfinite') != 'skip':
            skip = f', or algorithms.{name}.on_nonfinite=skip where single batches are the cause'
    warm_up = 'start them small with a schedule' if len(lower) > 1 else 'start it small with a scheduler'
    return f'Try a lower {" or ".join(lower)}, {warm_up}{skip}'

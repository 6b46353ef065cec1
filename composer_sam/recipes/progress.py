"""What a run shows while it trains: one bar in a terminal, lines at intervals elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque

from composer import Trainer
from composer.core import Callback, State, TimeUnit
from composer.loggers import ConsoleLogger, Logger, ProgressBarLogger
from composer.utils import dist

from composer_sam.extras import extra
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import numeric
from composer_sam.recipes.early_stopping import VALIDATION, is_finished, measured
from composer_sam.recipes.schema import Recipe

with extra('composer', __name__):
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

__all__ = ['Progress', 'describe']

_REFRESH_SECONDS = 0.1
_SMOOTHED_STEPS = 50
_TESTS, _LINES = 25, 10  # lines per run: at most so many after tests, and so many where there are few tests


class Progress(Callback):
    """A callback that shows the epoch, the step, the training loss and the test accuracy on stderr, on rank 0 only.

    In a terminal it is one bar as wide as the terminal; what is printed meanwhile appears above it. Elsewhere it is a
    line at intervals, at most about 30 in a run. It shows nothing where Composer's own progress bar or console logger
    is turned on.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_SMOOTHED_STEPS)
        self._accuracy: float | None = None
        self._shows = False
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._refreshed = 0.0
        self._reported = 0.0
        self._steps_per_epoch: int | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        others = any(isinstance(one, (ProgressBarLogger, ConsoleLogger)) for one in logger.destinations)
        self._shows = dist.get_global_rank() == 0 and not others
        if not self._shows:
            return
        length = state.dataloader_len
        self._steps_per_epoch = None if length is None else int(length)
        self._reported = _elapsed(state)
        console = Console(stderr=True, highlight=False, markup=False)
        if console.is_terminal and not console.is_dumb_terminal:
            self._bar = Bar(
                TextColumn('{task.description}', markup=False),
                BarColumn(None),
                TimeRemainingColumn(compact=True),
                console=console,
                auto_refresh=False,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._task = self._bar.add_task(self._status(state), total=1.0)
            self._bar.start()
            self._update(self._bar, state)

    def batch_end(self, state: State, logger: Logger) -> None:
        del logger
        if self._shows:
            self._losses.append(sum(state.total_loss_dict.values()))
            self._show(state, _LINES)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        del logger
        if self._bar is not None:
            self._show(state, _LINES)

    def eval_end(self, state: State, logger: Logger) -> None:
        del logger
        if self._shows and state.dataloader_label != VALIDATION:
            self._accuracy, _ = measured(state)
            self._show(state, _TESTS)

    def fit_end(self, state: State, logger: Logger) -> None:
        del logger
        self._stop(state)

    def close(self, state: State, logger: Logger) -> None:
        del logger
        self._stop(state)  # of a run that was cut off, too

    def _show(self, state: State, lines: int) -> None:
        """Refresh the bar if it is time to, or print a line if the last one is 1 / ``lines`` of the run ago."""
        if self._bar is not None:
            now = time.monotonic()
            if now - self._refreshed >= _REFRESH_SECONDS:
                self._update(self._bar, state)
                self._refreshed = now
            return
        elapsed = _elapsed(state)
        # A hair less: 3 of 60 epochs are 1 / 20 of the run, whatever the last bits say. The end has its own line.
        if elapsed - self._reported >= 1 / lines - 1e-9 and not is_finished(state):
            self._reported = elapsed
            print(self._status(state), file=sys.stderr, flush=True)

    def _update(self, bar: Bar, state: State) -> None:
        bar.update(self._task, description=self._status(state), completed=_elapsed(state))
        bar.refresh()

    def _stop(self, state: State) -> None:
        self._shows = False
        if self._bar is not None:
            bar, self._bar = self._bar, None
            self._update(bar, state)
            bar.stop()

    def _status(self, state: State) -> str:
        step, per_epoch = state.timestamp.batch.value, self._steps_per_epoch
        steps, epochs = _lengths(state, per_epoch)
        epoch = state.timestamp.epoch.value + bool(state.timestamp.batch_in_epoch.value)
        parts = [f'epoch {epoch}{_of(epochs)}', f'step {step}{_of(steps)}']
        if self._losses:
            parts.append(f'loss {sum(self._losses) / len(self._losses):.4f}')
        if self._accuracy is not None:
            parts.append(f'test {self._accuracy:.2%}')
        return '  '.join(parts)


def describe(recipe: Recipe, trainer: Trainer) -> str:
    """Return one line on what a trainer trains."""
    state = trainer.state
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    methods = [algorithm for algorithm in state.algorithms if isinstance(algorithm, SharpnessAware)]
    optimizer = _named(recipe.optimizer['name'], {'lr': recipe.optimizer.get('lr')})
    processes = dist.get_world_size()
    parts = [
        f'{recipe.model.name} with {parameters:,} parameters',
        recipe.data.name,
        *(_named(type(method).__name__, _radii(method)) for method in methods),
        *(() if methods else ('no method',)),
        f'base optimizer {optimizer}',
        type(state.device).__name__.removeprefix('Device').lower(),
        f'{processes} process{"es" if processes > 1 else ""}',
    ]
    return f'{recipe.name}: {", ".join(parts)}'


def _radii(method: SharpnessAware) -> dict[str, object]:
    found: dict[str, object] = {name: getattr(method, name) for name in numeric(type(method)) if 'rho' in name}
    return found | ({'interval': method.interval} if method.interval > 1 else {})


def _named(name: str, values: dict[str, object]) -> str:
    shown = ' '.join(f'{key} {value}' for key, value in values.items() if value is not None)
    return f'{name} ({shown})' if shown else name


def _elapsed(state: State) -> float:
    elapsed = state.get_elapsed_duration()
    return 0.0 if elapsed is None else min(1.0, float(elapsed.value))


def _lengths(state: State, per_epoch: int | None) -> tuple[int | None, int | None]:
    """Return the number of steps and epochs of the whole run, each None if it is not known."""
    duration = state.max_duration
    if duration is None or per_epoch is None:
        return None, None
    if duration.unit == TimeUnit.EPOCH:
        return duration.value * per_epoch, duration.value
    if duration.unit == TimeUnit.BATCH:
        return duration.value, math.ceil(duration.value / per_epoch)
    return None, None


def _of(total: int | None) -> str:
    return '' if total is None else f'/{total}'

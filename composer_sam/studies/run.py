"""One run of a study: trained on from its checkpoint, measured, and kept as a file."""

from __future__ import annotations

import json
import math
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import composer
import torch
from composer import Trainer
from composer.core import State
from composer.loggers import Logger, LoggerDestination

from composer_sam.diagnostics import measure
from composer_sam.recipes import History, Recipe, build_trainer, is_finished
from composer_sam.studies.checkpoints import build_problem
from composer_sam.studies.parallel import Report, write
from composer_sam.trainers.composer import GradientGeometryMonitor
from composer_sam.version import __version__

__all__ = ['Sharpness', 'StudyRun', 'config_of', 'train_and_measure']

_GEOMETRY = 'geometry/'
# Says where a run is kept and how it is shown, not what comes of it.
_NOT_COMPARED = ('run_name', 'save_folder', 'save_interval', 'autoresume', 'grid')


@dataclass(frozen=True)
class Sharpness:
    """How the sharpness of a trained network is measured.

    Attributes:
        samples: Of the training data, without augmentation.
        rho: Radius of SAM sharpness.
    """

    samples: int = 512
    rho: float = 0.05


@dataclass(frozen=True)
class StudyRun:
    """A recipe at one point of its grid with one seed.

    Attributes:
        name: Of its file.
        recipe: As it is trained.
        values: Of the grid's keys.
        config: Everything its result follows from.
        file: Where its result is or will be.
        keep_checkpoints: Whether the checkpoints stay when it is done.
    """

    name: str
    recipe: Recipe
    values: dict[str, Any]
    config: dict[str, Any]
    file: Path
    keep_checkpoints: bool = False


class _Curves(History, LoggerDestination):
    """A history that is part of the checkpoint, so that a run that goes on has all of it; and what monitors log.

    Attributes:
        geometry: ``epoch``, and by name the mean of what ``GradientGeometryMonitor`` logged in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.geometry: dict[str, list[float]] = {}
        self._sums: dict[str, float] = {}
        self._logged = 0

    @property
    def seconds(self) -> float:
        return sum(self._seconds)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        del step
        found = {key: value for key, value in metrics.items() if key.startswith(_GEOMETRY)}
        self._logged += bool(found)
        for key, value in found.items():
            self._sums[key] = self._sums.get(key, 0.0) + value

    def epoch_end(self, state: State, logger: Logger) -> None:
        super().epoch_end(state, logger)
        self._close_geometry(float(state.timestamp.epoch.value))

    def fit_end(self, state: State, logger: Logger) -> None:
        super().fit_end(state, logger)
        self._close_geometry(self.train['epoch'][-1])

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def _close_geometry(self, epoch: float) -> None:
        if self._logged:
            for name, value in ({'epoch': epoch * self._logged} | self._sums).items():
                self.geometry.setdefault(name.removeprefix(_GEOMETRY), []).append(value / self._logged)
            self._sums, self._logged = {}, 0


def config_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a dumped recipe decides the result, as JSON gives it back."""
    kept = {key: value for key, value in recipe.items() if key not in _NOT_COMPARED}
    kept['trainer'] = {key: value for key, value in kept.get('trainer', {}).items() if key != 'progress_bar'}
    return json.loads(json.dumps(kept, default=str))


def train_and_measure(
    recipe: Recipe, report: Report, runs: dict[str, StudyRun], sharpness: Sharpness | None
) -> dict[str, Any]:
    """Trains one run, from its newest checkpoint if there is one, measures it, writes its file and returns that.

    Args:
        recipe: Of the run.
        report: Told how far training is.
        runs: By their recipes' ``run_name``.
        sharpness: How to measure it, if so.
    """
    run = runs[str(recipe.run_name)]
    curves = _Curves()
    trainer = build_trainer(recipe, [*_monitors(recipe), curves, report])
    try:
        # As a destination of metrics; in the Trainer it must be a callback, as only those are in checkpoints.
        trainer.logger.destinations = (*trainer.logger.destinations, curves)
        if not is_finished(trainer.state):  # as it is where a run was cut off while it was measured
            trainer.fit()
        if not curves.test['epoch']:
            trainer.eval()
    finally:
        trainer.close()
    found = {
        'name': run.name,
        'recipe': recipe.name,
        'values': run.values,
        'seed': recipe.seed,
        'accuracy': curves.test['accuracy'][-1],
        'test_loss': curves.test['loss'][-1],
        'train_loss': curves.train['loss'][-1],
        'steps': curves.steps,
        'seconds': curves.seconds,
        'sharpness': None if sharpness is None else _measure(trainer, recipe, sharpness),
        'train': curves.train,
        'test': curves.test,
        'geometry': curves.geometry or None,
        'threads': torch.get_num_threads(),
        'versions': {
            'composer_sam': __version__,
            'torch': torch.__version__,
            'mosaicml': composer.__version__,
            'python': platform.python_version(),
        },
        'config': run.config,
    }
    found = _finite(found)
    write(run.file, json.dumps(found, indent=1, allow_nan=False).encode())
    if not run.keep_checkpoints:
        shutil.rmtree(str(recipe.save_folder), ignore_errors=True)
    return found


def _monitors(recipe: Recipe) -> list[GradientGeometryMonitor]:
    from composer_sam.methods import registry

    named = {name.replace('_', '').lower() for name in recipe.algorithms}
    return [GradientGeometryMonitor()] if named & {name.lower() for name in registry} else []


def _measure(trainer: Trainer, recipe: Recipe, sharpness: Sharpness) -> dict[str, Any]:
    """The sharpness of the trained network; of one that has diverged, why it has none."""
    problem = build_problem(recipe, 'train', sharpness.samples)
    model: Any = trainer.state.model
    try:
        measured = measure(
            getattr(model, '_orig_mod', model),  # a compiled one cannot be differentiated twice
            None,
            problem.batches,
            measures=('loss', 'gradient_norm', 'top_eigenvalue', 'trace', 'sam_sharpness'),
            rho=sharpness.rho,
            microbatch=problem.microbatch,
        )
    except (ValueError, RuntimeError) as error:
        return {'error': f'{type(error).__name__}: {error}'}
    return dict(measured.as_dict())


def _finite(value: Any) -> Any:
    """JSON has no word for what is not finite: null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

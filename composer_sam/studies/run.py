"""One run of a study: resumed from its checkpoint, trained, measured, and stored in a file."""

from __future__ import annotations

import json
import platform
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import composer
import torch
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger, LoggerDestination
from torch import nn

from composer_sam.files import write_whole
from composer_sam.methods import registry
from composer_sam.recipes import History, Recipe, RecipeError, build_trainer, is_finished
from composer_sam.recipes.save_folder import folder_of, hold_folder
from composer_sam.studies.parallel import Report
from composer_sam.studies.problem import build_problem
from composer_sam.studies.result import RunResult, TrainedSharpness
from composer_sam.studies.sharpness import Sharpness, measure_trained
from composer_sam.trainers.composer import GradientGeometryMonitor
from composer_sam.version import __version__

__all__ = ['Curves', 'StudyRun', 'compared', 'config_of', 'train_and_measure', 'trained']

_GEOMETRY = 'geometry/'  # how the names of GradientGeometryMonitor's metrics begin
_MEASURES = ('loss', 'gradient_norm', 'top_eigenvalue', 'trace', 'sam_sharpness')
# Keys of a recipe that the result does not depend on.
_NOT_COMPARED = ('run_name', 'save_folder', 'save_interval', 'autoresume', 'stop_at_nonfinite', 'grid')


@dataclass(frozen=True)
class StudyRun:
    """A recipe at one point of its grid, with one seed.

    Attributes:
        name: the name of the run and of its file.
        recipe: the recipe as it is trained.
        values: the values of the grid's keys.
        config: everything its result depends on.
        file: the file of its result.
        keep_checkpoints: whether the checkpoints are kept when the run is finished.
    """

    name: str
    recipe: Recipe
    values: dict[str, Any]
    config: dict[str, Any]
    file: Path
    keep_checkpoints: bool = False


class Curves(History, LoggerDestination):
    """A history that is part of the checkpoint, so that a resumed run has all of it, with the metrics of monitors.

    Attributes:
        geometry: ``epoch``, and by name the mean over the epoch of every metric of ``GradientGeometryMonitor``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.geometry: dict[str, list[float]] = {}
        self._sums: dict[str, float] = {}
        self._logged = 0

    @property
    def seconds(self) -> float:
        """Wall time of all steps."""
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


def config_of(recipe: Recipe, seed: int, sharpness: Sharpness | None) -> dict[str, Any]:
    """Return everything that the result of a run depends on, in JSON's own types."""
    config = compared(recipe.written() | {'seed': seed})
    # Texts from the environment can be secret: these few bits tell two of them apart, and tell nobody what they are.
    checksums = {key: zlib.crc32(str(text).encode()) % 2**16 for key, text in recipe.from_environment().items()}
    if checksums:
        config['environment'] = {key: f'checksum {value:04x}' for key, value in checksums.items()}
    config['sharpness'] = None if sharpness is None else vars(sharpness)
    return config


def compared(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a dumped recipe that the result depends on, in JSON's own types."""
    kept = {key: value for key, value in recipe.items() if key not in _NOT_COMPARED}
    kept['trainer'] = {key: value for key, value in kept.get('trainer', {}).items() if key != 'progress_bar'}
    return json.loads(json.dumps(kept, default=str))


def train_and_measure(
    recipe: Recipe,
    report: Report,
    runs: Mapping[str, StudyRun],
    sharpness: Sharpness | None,
    keep: Callable[[StudyRun, nn.Module], object] | None = None,
    geometry: bool = True,
) -> RunResult:
    """Train one run, from its newest checkpoint if there is one, measure the network, and write the run's file.

    Args:
        recipe: the recipe of the run.
        report: the callback that reports the progress of training.
        runs: all runs by the ``run_name`` of their recipes.
        sharpness: how the sharpness is measured; None not to measure it.
        keep: called with the run and its trained network, before the file is written.
        geometry: whether the directions of a method are compared with the gradient in every step.
    """
    run = runs[str(recipe.run_name)]
    curves = Curves()
    trainer = trained(recipe, curves, [*(_monitors(recipe) if geometry else []), report])
    result = RunResult(
        name=run.name,
        recipe=recipe.name,
        values=run.values,
        seed=recipe.seed,
        accuracy=curves.accuracy,
        test_loss=curves.loss,
        train_loss=curves.train['loss'][-1],
        steps=curves.steps,
        seconds=curves.seconds,
        sharpness=None if sharpness is None else _measure(trainer, recipe, sharpness),
        train=curves.train,
        test=curves.test,
        geometry=curves.geometry or None,
        threads=torch.get_num_threads(),
        versions={
            'composer_sam': __version__,
            'torch': torch.__version__,
            'mosaicml': composer.__version__,
            'python': platform.python_version(),
        },
        config=run.config,
    )
    if keep is not None:
        keep(run, trainer.state.model)
    content = result.to_json()
    write_whole(run.file, json.dumps(content, indent=1, allow_nan=False))
    if not run.keep_checkpoints:
        _delete_checkpoints(Path(str(recipe.save_folder)))
    return RunResult.from_json(content)


def _delete_checkpoints(folder: Path) -> None:
    """Delete the folder of a run; where it logged to TensorBoard, all of it but the event files."""
    if not any(folder.rglob('events.out.tfevents*')):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for file in (*folder.glob('*.pt'), folder / 'config.yaml'):
        file.unlink(missing_ok=True)


def trained(recipe: Recipe, curves: Curves, callbacks: Sequence[Callback]) -> Trainer:
    """Train a recipe to its end, from its newest checkpoint if there is one, and return its trainer, closed."""
    with hold_folder(recipe):
        trainer = build_trainer(recipe, [*callbacks, curves])
        try:
            # The curves are a destination of metrics, and a callback too, as only callbacks are part of checkpoints.
            trainer.logger.destinations = (*trainer.logger.destinations, curves)
            if is_finished(trainer.state):  # the run was killed while it was measured
                curves.fit_end(trainer.state, trainer.logger)
            else:
                trainer.fit()
            if not curves.test['epoch']:
                trainer.eval()
        except RecipeError:
            folder = folder_of(recipe)
            if folder is not None and not any(folder.glob('*.pt')):
                _delete_checkpoints(folder)  # a mistake that the first step finds leaves nothing behind
            raise
        finally:
            trainer.close()
    return trainer


def _monitors(recipe: Recipe) -> list[GradientGeometryMonitor]:
    """Return the monitor of a method's directions, for recipes with a method whose first pass is at w."""
    named = {name.replace('_', '').lower() for name in recipe.algorithms}
    compared = {name.lower() for name, method in registry.items() if not method.perturbs_first_pass}
    return [GradientGeometryMonitor()] if named & compared else []


def _measure(trainer: Trainer, recipe: Recipe, sharpness: Sharpness) -> TrainedSharpness:
    """Measure the trained network; if that fails, as for one that has diverged, return the error."""
    problem = build_problem(recipe, 'train', sharpness.samples)
    model = trainer.state.model
    network = getattr(model, '_orig_mod', model)  # a compiled network cannot be differentiated twice
    try:
        return TrainedSharpness.of(measure_trained(network, problem, sharpness, _MEASURES))
    except (ValueError, RuntimeError) as error:
        return TrainedSharpness(error=f'{type(error).__name__}: {error}')

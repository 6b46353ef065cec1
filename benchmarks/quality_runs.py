"""The runs of the quality benchmark: every candidate of a task with every seed, trained side by side and stored."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_sam import registry
from composer_sam.files import write_whole
from composer_sam.recipes import History, Recipe, build_trainer, load_recipe
from composer_sam.studies.parallel import Report, share_cores, train_all, with_seed

__all__ = ['Candidate', 'Outcome', 'Task', 'train']

ROOT = Path(__file__).resolve().parents[1]
VALIDATION = 0.2


@dataclass(frozen=True)
class Task:
    """A data set and network, and the candidates that are compared on it.

    Attributes:
        name: the name of the task in tables.
        recipe: the base recipe, plain SGD.
        overrides: laid over the recipe.
        epochs: the number of epochs every method trains for.
        radii: by method, the arguments from which the validation split chooses, the smallest radius first.
        intervals: whether intervals larger than 1 are compared too.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    epochs: int
    radii: Mapping[str, Sequence[Mapping[str, float]]]
    intervals: bool = False


@dataclass(frozen=True)
class Candidate:
    """A method with its arguments, or the base optimizer alone, trained for ``longer`` times the epochs of the task."""

    method: str = 'SGD'
    arguments: tuple[tuple[str, float], ...] = ()
    longer: int = 1

    @property
    def name(self) -> str:
        arguments = ', '.join(f'{key} {value:g}' for key, value in self.arguments)
        longer = f'{self.longer} times the epochs' if self.longer > 1 else ''
        return ', '.join(part for part in (self.method, arguments, longer) if part)

    @property
    def evaluations(self) -> float:
        """Mean number of gradients per step."""
        if self.method == 'SGD':
            return 1.0
        build: Any = registry[self.method]
        method = build(**dict(self.arguments))
        return 1 + (method.passes - 1) / method.interval


@dataclass(frozen=True)
class Outcome:
    """The results of a candidate, one value per seed.

    Attributes:
        accuracy: accuracy on the tested split, in percent.
        train_loss: mean training loss of the last epoch.
        milliseconds: time per step, including loading its batch.
        steps: the number of steps of a run.
    """

    accuracy: list[float]
    train_loss: list[float]
    milliseconds: list[float]
    steps: int


def train(
    task: Task, candidates: Sequence[Candidate], seeds: int, folder: Path, validation: bool, jobs: int | None
) -> dict[Candidate, Outcome]:
    """Train every candidate with every seed, unless ``folder`` has the run's file already.

    Args:
        task: the task.
        candidates: each is trained ``seeds`` times; a candidate that is given twice is trained once.
        seeds: the number of seeds: the recipe's own and those that follow it.
        folder: the folder of the runs' files.
        validation: test on a part of the training images, which is left out of training.
        jobs: how many runs are trained side by side; if None, one per core, and one on a GPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    candidates = list(dict.fromkeys(candidates))
    recipes = {candidate: _recipe(task, candidate, validation) for candidate in candidates}
    # Seed by seed, so that runs side by side slow all candidates down by the same amount.
    runs = [with_seed(recipes[c], recipes[c].seed + offset) for offset in range(seeds) for c in candidates]
    files = {str(run.run_name): folder / _file(task, run) for run in runs}
    missing = [run for run in runs if not files[str(run.run_name)].exists()]
    jobs, threads = share_cores(runs, jobs)
    if missing:
        train_all(missing, functools.partial(_train, files=files), _receive, jobs, threads)
    found = {name: json.loads(file.read_text()) for name, file in files.items()}
    outcomes = {}
    for candidate in candidates:
        own = [found[f'{candidate.name}-seed{recipes[candidate].seed + offset}'] for offset in range(seeds)]
        outcomes[candidate] = Outcome(
            [run['accuracy'] for run in own],
            [run['train_loss'] for run in own],
            [run['milliseconds'] for run in own],
            own[0]['steps'],
        )
    return outcomes


def _recipe(task: Task, candidate: Candidate, validation: bool) -> Recipe:
    epochs = task.epochs * candidate.longer
    overrides = [
        *task.overrides,
        f'name="{candidate.name}"',
        f'max_duration={epochs}ep',
        f'eval_interval={epochs}ep',
        f'data.validation_fraction={VALIDATION if validation else 0.0}',
    ]
    if candidate.method != 'SGD':
        overrides += [f'algorithms.{candidate.method.lower()}.{name}={value}' for name, value in candidate.arguments]
    return load_recipe(ROOT / task.recipe, (), overrides)


def _file(task: Task, run: Recipe) -> str:
    """Return a file name that is different for everything a result depends on."""
    said = json.dumps(run.model_dump(), sort_keys=True, default=str)
    name = re.sub(r'[^\w.=+-]+', '-', f'{task.name}-{run.run_name}')
    return f'{name}-{hashlib.sha256(said.encode()).hexdigest()[:8]}.json'


def _train(recipe: Recipe, report: Report, files: Mapping[str, Path]) -> dict[str, Any]:
    history = History()
    trainer = build_trainer(recipe, [history, report])
    try:
        trainer.fit()
    finally:
        trainer.close()
    loss = history.train['loss'][-1]
    found = {
        'run': recipe.run_name,
        'accuracy': 100 * history.test['accuracy'][-1],
        'train_loss': loss if math.isfinite(loss) else None,
        'milliseconds': 1e3 * history.seconds_per_step,
        'steps': history.steps,
    }
    write_whole(files[str(recipe.run_name)], json.dumps(found, indent=1))
    return found


def _receive(recipe: Recipe, result: Any) -> None:
    if isinstance(result, Exception):
        raise RuntimeError(f'{recipe.run_name} failed') from result

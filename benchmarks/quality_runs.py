"""The runs of the quality benchmark: every candidate of a task with every seed, trained side by side and stored."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from composer import Callback, Logger, State
from scipy import stats

from benchmarks.measure import ratios
from composer_sam.files import write_whole
from composer_sam.recipes import Diverged, History, Recipe, build_trainer, load_recipe
from composer_sam.studies.parallel import Report, share_cores, train_all, with_seed

__all__ = ['VALIDATION', 'Candidate', 'Outcome', 'Remedy', 'Task', 'best', 'equal_compute', 'train']

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
        normalised: whether the network has normalisation layers.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    epochs: int
    radii: Mapping[str, Sequence[Mapping[str, float]]]
    intervals: bool = False
    normalised: bool = False


@dataclass(frozen=True)
class Remedy:
    """Something else than a method against overfitting: its name in tables, and what it changes in the recipe."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A method with its arguments, or the base optimizer alone.

    Attributes:
        method: the name of the method; SGD for the base optimizer.
        arguments: its arguments.
        longer: by how many times more epochs it is trained than the task says.
        remedy: what else is done.
    """

    method: str = 'SGD'
    arguments: tuple[tuple[str, float | str], ...] = ()
    longer: float = 1
    remedy: Remedy | None = None

    @property
    def name(self) -> str:
        arguments = (f'{k} {v}' if isinstance(v, str) else f'{k} {v:g}' for k, v in self.arguments)
        longer = f'{self.longer:g} times the epochs' if self.longer > 1 else ''
        remedy = '' if self.remedy is None else self.remedy.name
        return ', '.join(part for part in (self.method, *arguments, longer, remedy) if part)


@dataclass(frozen=True)
class Outcome:
    """The results of a candidate, one value per seed.

    Attributes:
        accuracy: accuracy on the tested split, in percent; 0 for a run whose loss was not finite.
        train_loss: mean training loss of the last epoch; None where it was not finite.
        milliseconds: time per step, including loading its batch.
        passes: the number of passes per step, counted in samples: a pass over half of the batch is half a pass.
        steps: the number of steps of a run.
    """

    accuracy: list[float]
    train_loss: list[float | None]
    milliseconds: list[float]
    passes: list[float]
    steps: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Outcome:
        """Return the outcome that a row of a report has in its columns."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    def cost(self, base: Outcome) -> float:
        """Return the time of the whole training by that of ``base``, the median over the seeds."""
        return statistics.median(ratios(self.milliseconds, base.milliseconds)) * self.steps / base.steps

    def gain(self, base: Outcome) -> tuple[float, float]:
        """Return the mean gain over ``base`` in points, paired by seed, and half its 95% confidence interval."""
        gains = [own - other for own, other in zip(self.accuracy, base.accuracy, strict=True)]
        half = stats.t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains))
        return statistics.mean(gains), float(half)


class _Passes(Callback):
    """Counts the passes per step, in samples."""

    def __init__(self) -> None:
        self.per_step = math.nan
        self._seen = 0

    def before_forward(self, state: State, logger: Logger) -> None:
        del logger
        self._seen += len(state.batch[1])

    def batch_end(self, state: State, logger: Logger) -> None:
        del logger
        self.per_step = self._seen / state.timestamp.sample.value


def best(candidates: Sequence[Candidate], outcomes: Mapping[Candidate, Outcome]) -> Candidate:
    """Return the most accurate candidate; of equal ones the first, which has the smallest radius."""
    return max(candidates, key=lambda candidate: statistics.mean(outcomes[candidate].accuracy))


def equal_compute(cost: float, longer: Sequence[float]) -> float:
    """Return the first of the multiples of the epochs that costs as much as ``cost``, or a tenth less, or the last."""
    return next((times for times in longer if 1.1 * times >= cost), longer[-1])


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
    for candidate, recipe in recipes.items():
        own = [found[str(with_seed(recipe, recipe.seed + offset).run_name)] for offset in range(seeds)]
        values = {name: [run[name] for run in own] for name in ('accuracy', 'train_loss', 'milliseconds', 'passes')}
        # A run whose loss was not finite is cut off.
        outcomes[candidate] = Outcome(**values, steps=max(run['steps'] for run in own))
    return outcomes


def _recipe(task: Task, candidate: Candidate, validation: bool) -> Recipe:
    epochs = round(task.epochs * candidate.longer)
    overrides = [
        *task.overrides,
        f'name="{candidate.name}"',
        f'max_duration={epochs}ep',
        f'eval_interval={epochs}ep',
        f'data.validation_fraction={VALIDATION if validation else 0.0}',
    ]
    if candidate.method != 'SGD':
        overrides += [f'algorithms.{candidate.method.lower()}.{name}={value}' for name, value in candidate.arguments]
    if candidate.remedy is not None:
        overrides += candidate.remedy.overrides
    return load_recipe(ROOT / task.recipe, (), overrides)


def _file(task: Task, run: Recipe) -> str:
    """Return a file name that is different for everything a result depends on."""
    said = json.dumps(run.model_dump(), sort_keys=True, default=str)
    name = re.sub(r'[^\w.=+-]+', '-', f'{task.name}-{run.run_name}')
    return f'{name}-{hashlib.sha256(said.encode()).hexdigest()[:8]}.json'


def _train(recipe: Recipe, report: Report, files: Mapping[str, Path]) -> dict[str, Any]:
    history, passes = History(), _Passes()
    trainer = build_trainer(recipe, [history, passes, report])
    try:
        trainer.fit()
        accuracy = history.accuracy
    except Diverged:
        accuracy = 0.0
    finally:
        trainer.close()
    loss = history.train['loss'][-1] if history.train['loss'] else math.nan
    found = {
        'run': recipe.run_name,
        'accuracy': 100 * accuracy,
        'train_loss': loss if math.isfinite(loss) else None,
        'milliseconds': 1e3 * history.seconds_per_step,
        'passes': passes.per_step,
        'steps': history.steps,
    }
    write_whole(files[str(recipe.run_name)], json.dumps(found, indent=1))
    return found


def _receive(recipe: Recipe, result: Any) -> None:
    if isinstance(result, Exception):
        raise RuntimeError(f'{recipe.run_name} failed') from result

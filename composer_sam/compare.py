"""Trains several recipes with several seeds, side by side, and shows how they differ."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import statistics
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from composer_sam.recipes import History, Recipe, RecipeError, build_trainer, load_recipe

__all__ = ['Run', 'RunError', 'compare', 'draw', 'tabulate']

_REPORTS_PER_RUN = 200


class RunError(RuntimeError):
    """One of the compared runs failed."""


@dataclass(frozen=True)
class Run:
    """What one run came to.

    Attributes:
        recipe: Name of the recipe.
        seed: Seed of the run.
        steps: Optimizer steps taken.
        seconds_per_step: Mean, testing left out.
        accuracy: On the test data, at the end.
        loss: On the test data, at the end.
        train: Training loss by epoch.
        test: Test accuracy and loss by epoch.
    """

    recipe: str
    seed: int
    steps: int
    seconds_per_step: float
    accuracy: float
    loss: float
    train: dict[str, list[float]]
    test: dict[str, list[float]]


def compare(
    paths: Sequence[str],
    overrides: Sequence[str] = (),
    seeds: int = 1,
    out: Path = Path('comparison'),
    jobs: int | None = None,
) -> list[Run]:
    """Trains every recipe with ``seeds`` seeds, prints a table and writes ``comparison.png`` and ``results.json``.

    The seeds are the recipe's own and those that follow it. Runs take turns by recipe, so that what runs side by side
    slows all recipes alike. Checkpoints, where a recipe asks for them, go to a directory per run.

    Args:
        paths: The recipes' files; costs are relative to the first.
        overrides: ``dotted.key=value``, laid over every recipe.
        seeds: Runs per recipe.
        out: Directory for the picture and the results.
        jobs: Runs side by side; by default one per core, and one where a GPU is used.

    Raises:
        RecipeError: If a recipe or ``out`` is not valid; nothing has been trained then.
        RunError: If a run failed.
    """
    recipes = _load(paths, overrides)
    runs = [_with_seed(recipe, recipe.seed + offset) for offset in range(seeds) for recipe in recipes]
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(None, 'no permission')
    except OSError as error:
        raise RecipeError(f'--out: {str(out)!r} cannot be written: {error.strerror}') from None

    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    if jobs is None:
        on_gpu = torch.cuda.is_available() and any(recipe.device != 'cpu' for recipe in recipes)
        jobs = 1 if on_gpu else cores
    jobs = min(jobs, len(runs))
    threads = max(1, cores // jobs)
    results = _train_all(runs, jobs, threads)

    how = f'{jobs} runs side by side, {threads} {"thread" if threads == 1 else "threads"} each'
    report = {'how': how, 'runs': [asdict(run) for run in results]}
    _write(out / 'results.json', json.dumps(report, indent=1).encode())
    picture = out / 'comparison.png'
    draw(results).savefig(picture, dpi=150)
    console = Console(highlight=False, markup=False)
    console.print(tabulate(results))
    console.print(f'{how}; curves in {picture}, numbers in {out / "results.json"}', soft_wrap=True)
    return results


def tabulate(runs: Sequence[Run]) -> Table:
    """One row per recipe: mean and standard deviation over the seeds, and the cost of a step."""
    table = Table(box=None, pad_edge=False)
    table.add_column('recipe')
    for heading in ('seeds', 'test accuracy', 'test loss', 'ms per step', 'cost'):
        table.add_column(heading, justify='right')
    grouped = _by_recipe(runs)
    baseline = statistics.fmean(run.seconds_per_step for run in next(iter(grouped.values())))
    for name, group in grouped.items():
        seconds = [run.seconds_per_step for run in group]
        table.add_row(
            name,
            str(len(group)),
            _spread([100 * run.accuracy for run in group], 1, ' %'),
            _spread([run.loss for run in group], 3),
            _spread([1000 * second for second in seconds], 2),
            f'{statistics.fmean(seconds) / baseline:.2f}x',
        )
    return table


def draw(runs: Sequence[Run]) -> Figure:
    """Test accuracy and training loss by epoch: the mean over the seeds in a band from lowest to highest."""
    figure = Figure(figsize=(11, 4.2), layout='constrained')
    accuracy, loss = figure.subplots(1, 2)
    for name, group in _by_recipe(runs).items():
        for axes, curves, key, scale in (
            (accuracy, [run.test for run in group], 'accuracy', 100),
            (loss, [run.train for run in group], 'loss', 1),
        ):
            columns = list(zip(*(curve[key] for curve in curves), strict=False))
            epochs = curves[0]['epoch'][: len(columns)]
            (line,) = axes.plot(epochs, [scale * statistics.fmean(column) for column in columns], label=name)
            lowest, highest = ([scale * pick(column) for column in columns] for pick in (min, max))
            axes.fill_between(epochs, lowest, highest, alpha=0.2, color=line.get_color(), linewidth=0)
    accuracy.set(xlabel='epoch', ylabel='test accuracy (%)')
    loss.set(xlabel='epoch', ylabel='training loss')
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
    accuracy.legend(frameon=False)
    return figure


def _load(paths: Sequence[str], overrides: Sequence[str]) -> list[Recipe]:
    if not paths:
        raise RecipeError('compare needs at least one recipe')
    recipes = [load_recipe(path, (), overrides) for path in paths]
    for index, recipe in enumerate(recipes):
        for path, earlier in zip(paths, recipes[:index], strict=False):
            if recipe.name == earlier.name:
                raise RecipeError(
                    f'name: {path} and {paths[index]} are both called {recipe.name!r}; rename one of them'
                )
    return recipes


def _with_seed(recipe: Recipe, seed: int) -> Recipe:
    """The recipe as one of several runs: a seed and a checkpoint directory of its own and no progress bar."""
    run_name = f'{recipe.run_name or recipe.name}-seed{seed}'
    save_folder = recipe.save_folder
    if save_folder is not None and '{run_name}' not in save_folder:
        save_folder = str(Path(save_folder) / run_name)
    return recipe.model_copy(
        update={
            'seed': seed,
            'run_name': run_name,
            'save_folder': save_folder,
            'trainer': recipe.trainer | {'progress_bar': False},
        },
    )


def _train_all(recipes: Sequence[Recipe], jobs: int, threads: int) -> list[Run]:
    # A server process imports Composer once, and the workers start from there.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__])
    reports = context.Queue()
    console = Console(stderr=True)
    bar = Progress(
        TextColumn('training {task.fields[runs]} runs'),
        BarColumn(None),
        TextColumn('{task.percentage:3.0f} %'),
        TimeRemainingColumn(),
        console=console,
    )
    task = bar.add_task('', total=len(recipes), runs=len(recipes))
    with bar, ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(reports, threads)) as pool:
        futures = {pool.submit(_train, recipe): recipe for recipe in recipes}
        try:
            while not all(future.done() for future in futures):
                _raise_failure(futures)
                try:
                    bar.advance(task, reports.get(timeout=0.2))
                except queue.Empty:
                    continue
            _raise_failure(futures)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        bar.update(task, completed=len(recipes))
    return [future.result() for future in futures]


def _raise_failure(futures: dict[Future[Run], Recipe]) -> None:
    for future, recipe in futures.items():
        if future.done() and (error := future.exception()) is not None:
            if isinstance(error, RecipeError):
                raise error
            raise RunError(f'{recipe.run_name} failed: {type(error).__name__}: {error}') from error


class _Report(Callback):
    """Puts the parts of the run that have been trained into the queue, a few hundred times a run."""

    def __init__(self, reports: Any) -> None:
        self.reports = reports
        self.reported = 0.0

    def batch_end(self, state: State, logger: Logger) -> None:
        del logger
        elapsed = state.get_elapsed_duration()
        if elapsed is not None and elapsed.value - self.reported >= 1 / _REPORTS_PER_RUN:
            self.reports.put(elapsed.value - self.reported)
            self.reported = elapsed.value


_reports: Any = None  # in a worker process: the queue to report to, which only inheritance can hand over


def _start_worker(reports: Any, threads: int) -> None:
    global _reports
    _reports = reports
    torch.set_num_threads(threads)


def _train(recipe: Recipe) -> Run:
    history = History()
    trainer = build_trainer(recipe, [history, _Report(_reports)])
    try:
        trainer.fit()
        if not history.test['epoch']:
            trainer.eval()
    finally:
        trainer.close()
    return Run(
        recipe=recipe.name,
        seed=recipe.seed,
        steps=history.steps,
        seconds_per_step=history.seconds_per_step,
        accuracy=history.test['accuracy'][-1],
        loss=history.test['loss'][-1],
        train=history.train,
        test=history.test,
    )


def _by_recipe(runs: Sequence[Run]) -> dict[str, list[Run]]:
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.recipe, []).append(run)
    return grouped


def _spread(values: Sequence[float], digits: int, unit: str = '') -> str:
    mean = f'{statistics.fmean(values):.{digits}f}'
    return f'{mean} ± {statistics.stdev(values):.{digits}f}{unit}' if len(values) > 1 else f'{mean}{unit}'


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f'.{path.name}.partial')
    partial.write_bytes(content)
    partial.replace(path)

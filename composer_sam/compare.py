"""Trains several recipes with several seeds, side by side, and shows how they differ."""

from __future__ import annotations

import json
import multiprocessing.connection
import os
import signal
import statistics
import threading
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
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
_GRACE_SECONDS = 10  # for a run that is told to end to close its files


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
    run_name = f'{recipe.name}-seed{seed}'  # names differ, while a run_name can come from a common base
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
    """Trains every recipe in a process of its own, ``jobs`` of them at a time; a failure ends them all."""
    # A server process imports Composer once, and the runs' processes start from there.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__])
    _start_server()
    waiting = list(reversed(recipes))
    running: dict[Connection, tuple[Recipe, BaseProcess]] = {}
    finished: dict[tuple[str, int], Run] = {}
    bar = Progress(
        TextColumn(f'training {len(recipes)} runs'),
        BarColumn(None),
        TextColumn('{task.percentage:3.0f} %'),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task('', total=len(recipes))
    with bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    recipe = waiting.pop()
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_train_in_process, args=(recipe, threads, sender))
                    process.start()
                    sender.close()
                    running[receiver] = recipe, process
                for receiver in multiprocessing.connection.wait(list(running)):
                    recipe, process = running[receiver]  # pyright: ignore[reportArgumentType]
                    message = _receive(receiver, recipe)
                    if isinstance(message, Run):
                        finished[recipe.name, recipe.seed] = message
                        process.join()
                        del running[receiver]  # pyright: ignore[reportArgumentType]
                    elif isinstance(message, Exception):
                        raise message
                    else:
                        bar.advance(task, message)
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.join(_GRACE_SECONDS)
                process.kill()
        bar.update(task, completed=len(recipes))
    return [finished[recipe.name, recipe.seed] for recipe in recipes]


def _start_server() -> None:
    """Starts the server process deaf to an interrupt: the first process hears it and ends the others."""
    if threading.current_thread() is not threading.main_thread():
        return  # where Python does not let signals be set, nor be heard
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _receive(receiver: Any, recipe: Recipe) -> float | Run | Exception:
    try:
        return receiver.recv()
    except EOFError:
        return RunError(f'{recipe.run_name} ended without a result; its process was killed or crashed')


def _train_in_process(recipe: Recipe, threads: int, sender: Connection) -> None:
    """Trains one recipe and sends, in this order, any number of trained parts and the run or what prevented it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in _start_server; importing Composer has set its own handler
    torch.set_num_threads(threads)
    history = History()
    try:
        trainer = build_trainer(recipe, [history, _Report(sender)])
        try:
            trainer.fit()
            if not history.test['epoch']:
                trainer.eval()
        finally:
            trainer.close()
    except RecipeError as error:
        sender.send(error)
    except Exception as error:
        traceback.print_exc()
        sender.send(RunError(f'{recipe.run_name} failed: {type(error).__name__}: {error}'))
    else:
        sender.send(
            Run(
                recipe=recipe.name,
                seed=recipe.seed,
                steps=history.steps,
                seconds_per_step=history.seconds_per_step,
                accuracy=history.test['accuracy'][-1],
                loss=history.test['loss'][-1],
                train=history.train,
                test=history.test,
            ),
        )


class _Report(Callback):
    """Sends the parts of the run that have been trained, a few hundred times a run."""

    def __init__(self, sender: Connection) -> None:
        self.sender = sender
        self.reported = 0.0

    def batch_end(self, state: State, logger: Logger) -> None:
        del logger
        elapsed = state.get_elapsed_duration()
        if elapsed is not None and elapsed.value - self.reported >= 1 / _REPORTS_PER_RUN:
            self.sender.send(elapsed.value - self.reported)
            self.reported = elapsed.value


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

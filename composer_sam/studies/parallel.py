"""Recipes trained side by side, each in a process of its own."""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from composer_sam.extras import extra
from composer_sam.files import disk_full, file_name
from composer_sam.processes import ProcessDied, Returned, Sent, run_tasks
from composer_sam.recipes import Diverged, Recipe, RecipeError, messages
from composer_sam.studies.console import messages_console

with extra('composer', __name__):
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ['TRAINING', 'Report', 'RunError', 'Stage', 'share_cores', 'train_all', 'with_seed']

_REPORTS_PER_RUN = 200

Result = TypeVar('Result')


class RunError(RuntimeError):
    """A run failed."""


@dataclass(frozen=True)
class Stage:
    """The words for what is done to the runs side by side.

    Attributes:
        bar: the text of the progress bar, with a place for the number of runs.
        ended: what a run is that has ended now.
        finished: what a run is that was finished before.
        nothing_left: what is said first where all are.
    """

    bar: str
    ended: str
    finished: str
    nothing_left: str = ''


TRAINING = Stage('training {} runs', 'trained', 'done', 'nothing was left to train: ')


class Report(Callback):
    """Reports the part of the run that was trained since the last report, a few hundred times a run.

    Args:
        send: called with the part, in [0, 1].
    """

    def __init__(self, send: Callable[[float], None]) -> None:
        self.send = send
        self.reported = 0.0

    def batch_end(self, state: State, logger: Logger) -> None:
        del logger
        elapsed = state.get_elapsed_duration()
        if elapsed is not None and elapsed.value - self.reported >= 1 / _REPORTS_PER_RUN:
            self.send(elapsed.value - self.reported)
            self.reported = elapsed.value


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """Return the recipe as one of several runs: with its own seed and checkpoint folder, without a progress bar."""
    # Names differ between recipes; a run_name can come from a common base. It is a part of paths.
    run_name = file_name(f'{recipe.name}-seed{seed}')
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


def share_cores(recipes: Sequence[Recipe], jobs: int | None) -> tuple[int, int]:
    """Return how many runs train side by side, and the number of threads of each.

    Args:
        recipes: all runs.
        jobs: how many may train side by side; if None, one per core, and one where a GPU is used.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    if jobs is None:
        on_gpu = torch.cuda.is_available() and any(recipe.device != 'cpu' for recipe in recipes)
        jobs = 1 if on_gpu else cores
    jobs = min(jobs, len(recipes))
    return jobs, max(1, cores // jobs)


def train_all(
    recipes: Sequence[Recipe],
    work: Callable[[Recipe, Report], Result],
    receive: Callable[[Recipe, Result | Exception], None],
    jobs: int,
    threads: int,
    stage: Stage = TRAINING,
) -> None:
    """Call ``work`` on every recipe in a process of its own, and show a progress bar.

    Args:
        recipes: the recipes, each with its own ``run_name``.
        work: trains a recipe with the given callback; it and its result must be picklable.
        receive: called with the result of every recipe, or with the exception it ended with, a :class:`RunError` or
            a :class:`~composer_sam.recipes.RecipeError`. An exception that it raises ends all runs.
        jobs: how many processes run at a time.
        threads: the number of threads of each process.
        stage: the words for what is done.
    """
    console = messages_console()
    for name in dict.fromkeys(recipe.name for recipe in recipes if recipe.grid):
        console.print(f'{name} is trained once, without its grid; composer-sam study trains the grid', soft_wrap=True)
    bar = Progress(
        TextColumn(stage.bar.format(len(recipes))),
        BarColumn(None),
        TextColumn('{task.percentage:3.0f} %'),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,  # elsewhere a line for every run that has ended
    )
    trained = bar.add_task('', total=len(recipes))
    tasks = [functools.partial(_train, work, recipe, threads) for recipe in recipes]
    # The server process imports Composer once, and the processes of the runs are forked from it.
    ended = 0
    with bar, closing(run_tasks(tasks, jobs, preload=__name__)) as events:
        for index, event in events:
            recipe = recipes[index]
            if isinstance(event, Sent):
                if isinstance(event.message, str):
                    console.print(f'{recipe.run_name}: {event.message}', soft_wrap=True)
                else:
                    bar.advance(trained, event.message)
            elif isinstance(event, Returned):
                receive(recipe, event.result)
                ended += 1
                if not console.is_terminal:
                    console.print(
                        f'{ended} of {len(recipes)} runs are {stage.ended}: {recipe.run_name}', soft_wrap=True
                    )
            elif isinstance(event.error, ProcessDied):
                died = f'{recipe.run_name} ended without a result; its process was killed or crashed'
                receive(recipe, RunError(died))
            else:
                receive(recipe, event.error)
        bar.update(trained, completed=len(recipes))


def _train(
    work: Callable[[Recipe, Report], Result], recipe: Recipe, threads: int, send: Callable[[float | str], None]
) -> Result:
    """Call ``work``; runs in a process of its own. Sends parts of the run, and lines to be printed above the bar."""
    torch.set_num_threads(threads)
    try:
        with messages(send):
            return work(recipe, Report(send))
    except RecipeError:
        raise
    except (Diverged, OSError) as error:
        raise RunError(f'{recipe.run_name} failed: {error}') from error
    except Exception as error:
        if (why := disk_full(error)) is not None:
            raise RunError(f'{recipe.run_name} failed: {why}') from error
        send(traceback.format_exc())
        raise RunError(f'{recipe.run_name} failed: {type(error).__name__}: {error}') from error

"""Trains recipes in processes side by side."""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from composer_sam.recipes import Recipe, RecipeError

__all__ = ['Report', 'RunError', 'make_folder', 'share_cores', 'train_all', 'with_seed', 'write']

_REPORTS_PER_RUN = 200
_GRACE_SECONDS = 10  # for a run that is told to end to close its files

Result = TypeVar('Result')


class RunError(RuntimeError):
    """A run failed."""


class Report(Callback):
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


class _Finished(Generic[Result]):
    """What a run came to, told apart from the parts it reports."""

    def __init__(self, result: Result) -> None:
        self.result = result


def with_seed(recipe: Recipe, seed: int) -> Recipe:
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


def make_folder(out: Path) -> None:
    """Makes the directory for results.

    Raises:
        RecipeError: If it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(None, 'no permission')
    except OSError as error:
        raise RecipeError(f'--out: {str(out)!r} cannot be written: {error.strerror}') from None


def share_cores(recipes: Sequence[Recipe], jobs: int | None) -> tuple[int, int]:
    """How many of the runs go side by side, by default one per core and one on a GPU, and with how many threads."""
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
) -> None:
    """Does ``work`` on every recipe in a process of its own, ``jobs`` of them at a time.

    Args:
        recipes: Each with a ``run_name`` of its own.
        work: Trains one with the callback given and returns what it came to; it and its result can be pickled.
        receive: Called with what a run returned or what prevented it. What it raises ends all runs.
        jobs: How many at a time.
        threads: Of each process.
    """
    console = Console(stderr=True, highlight=False, markup=False)
    for name in dict.fromkeys(recipe.name for recipe in recipes if recipe.grid):
        console.print(f'{name} is trained at one point; its grid is what composer-sam study trains', soft_wrap=True)
    # A server process imports Composer once, and the runs' processes start from there.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__])
    _start_server()
    waiting = list(reversed(recipes))
    running: dict[Connection, tuple[Recipe, BaseProcess]] = {}
    bar = Progress(
        TextColumn(f'training {len(recipes)} runs'),
        BarColumn(None),
        TextColumn('{task.percentage:3.0f} %'),
        TimeRemainingColumn(),
        console=console,
    )
    task = bar.add_task('', total=len(recipes))
    with bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    recipe = waiting.pop()
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_work_in_process, args=(work, recipe, threads, sender))
                    process.start()
                    sender.close()
                    running[receiver] = recipe, process
                for receiver in multiprocessing.connection.wait(list(running)):
                    recipe, process = running[receiver]  # pyright: ignore[reportArgumentType]
                    message: Any = _receive(receiver, recipe)
                    if isinstance(message, float):
                        bar.advance(task, message)
                        continue
                    if isinstance(message, _Finished):
                        process.join()
                    del running[receiver]  # pyright: ignore[reportArgumentType]
                    receive(recipe, message.result if isinstance(message, _Finished) else message)
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.join(_GRACE_SECONDS)
                process.kill()
        bar.update(task, completed=len(recipes))


def write(path: Path, content: bytes) -> None:
    """Writes a file that a reader sees whole or not at all."""
    partial = path.with_name(f'.{path.name}.partial')
    partial.write_bytes(content)
    partial.replace(path)


def _start_server() -> None:
    """Starts the server process deaf to an interrupt: the first process hears it and ends the others."""
    if threading.current_thread() is not threading.main_thread():
        return  # where Python does not let signals be set, nor be heard
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _receive(receiver: Any, recipe: Recipe) -> float | _Finished[Any] | Exception:
    try:
        return receiver.recv()
    except EOFError:
        return RunError(f'{recipe.run_name} ended without a result; its process was killed or crashed')


def _work_in_process(work: Callable[[Recipe, Report], Any], recipe: Recipe, threads: int, sender: Connection) -> None:
    """Does the work and sends, in this order, any number of trained parts and the result or what prevented it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in _start_server; importing Composer has set its own handler
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        message = _Finished(work(recipe, Report(sender)))
    except RecipeError as error:
        message = error
    except Exception as error:
        traceback.print_exc()
        message = RunError(f'{recipe.run_name} failed: {type(error).__name__}: {error}')
    sender.send(message)


def _end_with_the_first() -> None:
    """Ends this process with the one that started it, which may be killed and be started anew on the same runs."""
    first = multiprocessing.parent_process()
    if first is not None:
        first.join()
        os._exit(1)

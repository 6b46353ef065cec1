"""Runs side by side whose results are kept as files, so that what is finished is not trained again."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from omegaconf import OmegaConf

from composer_sam.files import FolderInUse, holding, make_writable
from composer_sam.recipes import Recipe, RecipeError
from composer_sam.studies.console import note
from composer_sam.studies.parallel import TRAINING, Report, Stage, train_all
from composer_sam.studies.run import StudyRun, compared

__all__ = ['finished_runs', 'results_folder', 'train_missing']


class Kept(Protocol):
    """The result of a run, as its file holds it."""

    @property
    def config(self) -> dict[str, Any]:
        """Everything the result depends on."""
        ...


Result = TypeVar('Result', bound=Kept)


def finished_runs(
    runs: Sequence[StudyRun],
    read: Callable[[dict[str, Any]], Result],
    complete: Callable[[Any], bool] = lambda run: True,
    stage: Stage = TRAINING,
) -> dict[str, Result]:
    """Return the results of the runs that are finished, by name, and say how many these are.

    Args:
        runs: all runs.
        read: returns the result that JSON's own types stand for.
        complete: whether a finished run has left everything that is needed; otherwise it is trained again.
        stage: the words for what is done.

    Raises:
        RecipeError: a file or a checkpoint is of a run with another configuration.
    """
    done: dict[str, Result] = {}
    for run in runs:
        found = _finished(run, read)
        if found is not None and complete(run):
            done[run.name] = found
        else:
            _check_checkpoint(run)
    if len(done) == len(runs):
        whole = 'the run is' if len(runs) == 1 else f'all {len(runs)} runs are'
        note(f'{stage.nothing_left}{whole} {stage.finished}')
    elif done:
        note(f'{len(done)} of {len(runs)} runs are {stage.finished}')
    return done


def train_missing(
    runs: Sequence[StudyRun],
    done: Mapping[str, Result],
    work: Callable[[Recipe, Report], Result],
    jobs: int,
    threads: int,
    stage: Stage = TRAINING,
) -> tuple[dict[str, Result], list[Exception]]:
    """Train the runs that are not done, side by side; return the results of all by name, and the errors of the others.

    Args:
        runs: all runs.
        done: the results of those that are finished.
        work: trains a run, writes its file and returns its result.
        jobs: how many runs are trained at a time.
        threads: the number of threads of each.
        stage: the words for what is done.

    Raises:
        RecipeError: a recipe is not valid, as was found when its data were read.
    """
    names = {str(run.recipe.run_name): run.name for run in runs if run.name not in done}
    found = dict(done)
    failures: list[Exception] = []

    def receive(recipe: Recipe, result: Result | Exception) -> None:
        if isinstance(result, RecipeError):
            raise result
        if isinstance(result, Exception):
            failures.append(result)
        else:
            found[names[str(recipe.run_name)]] = result

    if names:
        train_all([run.recipe for run in runs if run.name not in done], work, receive, jobs, threads, stage)
    return found, failures


@contextmanager
def results_folder(out: Path, *subfolders: str) -> Iterator[None]:
    """Make the folder of the results, and keep other processes from it during the context.

    Where an error ends the context, what is empty of what was made is removed.

    Raises:
        RecipeError: the folder cannot be written, or another process is writing it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(holding(out))
            before = _folders(out)
            for name in subfolders:
                make_writable(out / name)
        except FolderInUse as error:
            raise RecipeError(f'--out: {error}') from None
        except OSError as error:
            raise RecipeError(f'--out: {str(out)!r} cannot be written: {error.strerror}') from None
        try:
            yield
        except BaseException:
            for folder in sorted(_folders(out) - before, key=lambda folder: len(folder.parts), reverse=True):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise


def _folders(out: Path) -> set[Path]:
    return {Path(folder) for folder, _, _ in os.walk(out)}


def _finished(run: StudyRun, read: Callable[[dict[str, Any]], Result]) -> Result | None:
    """Return the result in the run's file, None if there is no file."""
    if not run.file.exists():
        return None
    try:
        found = read(json.loads(run.file.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f'{run.file} cannot be read ({error}); delete it to train the run anew') from None
    _check_same(run.file, found.config, run.config, 'delete it to train the run anew')
    return found


def _check_checkpoint(run: StudyRun) -> None:
    """Check that the run's checkpoint, if there is one, is of the same configuration."""
    folder = Path(str(run.recipe.save_folder))
    if run.recipe.save_folder is None or not (folder / 'config.yaml').exists():
        return
    saved = compared(OmegaConf.to_container(OmegaConf.load(folder / 'config.yaml')))  # pyright: ignore
    wanted = compared(run.recipe.written())
    for config in (saved, wanted):
        config['trainer'] = {k: v for k, v in config['trainer'].items() if k != 'save_num_checkpoints_to_keep'}
    _check_same(folder, saved, wanted, 'delete the folder to train the run from its start')


def _check_same(place: Path, found: dict[str, Any], wanted: dict[str, Any], remedy: str) -> None:
    if found == wanted:
        return
    held, asked = _flat(found), _flat(wanted)
    key = next(key for key in {**held, **asked} if held.get(key, 'nothing') != asked.get(key, 'nothing'))
    raise RecipeError(
        f'{place} is of a run with {key}={held.get(key, "nothing")}, and {asked.get(key, "nothing")} is asked for; '
        f'choose another --out, or {remedy}'
    )


def _flat(config: Any, prefix: str = '') -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    if not isinstance(config, dict) or not config:
        return {prefix.removesuffix('.'): config}
    return {key: value for name, item in config.items() for key, value in _flat(item, f'{prefix}{name}.').items()}

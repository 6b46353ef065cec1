"""Grids of recipes, values and seeds: trained, resumed after an interruption, and tabulated."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from composer_sam.extras import extra
from composer_sam.files import write_whole
from composer_sam.landscapes.pictures import png
from composer_sam.recipes import Recipe, RecipeError
from composer_sam.studies.console import console
from composer_sam.studies.drawing import draw
from composer_sam.studies.parallel import RunError, make_folder, share_cores, train_all
from composer_sam.studies.plan import StudyOptions, plan
from composer_sam.studies.result import RunResult
from composer_sam.studies.run import StudyRun, config_of, train_and_measure
from composer_sam.studies.tables import about, as_markdown, print_tables

with extra('composer', __name__):
    from rich.console import Console

__all__ = ['RunError', 'study']


def study(options: StudyOptions, jobs: int | None = None) -> list[RunResult]:
    """Train the runs whose results are missing, and write ``tables.md``, ``results.json`` and ``study.png``.

    Every finished run is one file in ``out/runs``. A run that was interrupted is resumed from its newest checkpoint in
    ``out/checkpoints``, which is saved as often as the ``save_interval`` of the recipe says.

    Args:
        options: the runs, and the folder of the results.
        jobs: how many runs are trained side by side; if None, one per core, and one where a GPU is used.

    Returns:
        The results of all runs, seed by seed.

    Raises:
        RecipeError: a recipe, a grid or the folder is not valid, or the folder holds runs of another study.
        RunError: runs failed; the others are finished, and are in the tables.
    """
    runs = plan(options)
    for folder in (options.out, options.out / 'runs'):
        make_folder(folder)
    done = {run.name: found for run in runs if (found := _finished(run)) is not None}
    missing = [run for run in runs if run.name not in done]
    for run in missing:
        _check_checkpoint(run)
    if done and missing:
        Console(stderr=True, highlight=False).print(f'{len(done)} of {len(runs)} runs are done')
    failures: list[Exception] = []
    if missing:
        # From all runs, not those that are missing: the number of threads decides the last bits of a result.
        jobs, threads = share_cores([run.recipe for run in runs], jobs)
        trained, failures = _train(missing, options, jobs, threads)
        done |= trained
    results = [done[run.name] for run in runs if run.name in done]
    if results:
        files = _write_report(results, options.out)
        print_tables(results)
        console().print(f'{len(results)} runs; {", ".join(map(str, files))}', soft_wrap=True)
    if failures:
        raise RunError(f'{len(failures)} of {len(runs)} runs failed: {"; ".join(map(str, failures))}')
    return results


def _train(
    runs: list[StudyRun], options: StudyOptions, jobs: int, threads: int
) -> tuple[dict[str, RunResult], list[Exception]]:
    """Train runs side by side; return the results by name, and the errors of the runs that failed."""
    by_name = {str(run.recipe.run_name): run for run in runs}
    done: dict[str, RunResult] = {}
    failures: list[Exception] = []

    def receive(recipe: Recipe, result: RunResult | Exception) -> None:
        if isinstance(result, RecipeError):
            raise result
        if isinstance(result, Exception):
            failures.append(result)
        else:
            done[by_name[str(recipe.run_name)].name] = result

    work = partial(train_and_measure, runs=by_name, sharpness=options.sharpness)
    train_all([run.recipe for run in runs], work, receive, jobs, threads)
    return done, failures


def _write_report(runs: list[RunResult], out: Path) -> list[Path]:
    """Write ``tables.md``, ``results.json`` and ``study.png``, and return the files."""
    results = {'about': about(runs), 'runs': [run.to_json() for run in runs]}
    write_whole(out / 'tables.md', as_markdown(runs))
    write_whole(out / 'results.json', json.dumps(results, indent=1))
    write_whole(out / 'study.png', png(draw(runs)))
    return [out / name for name in ('tables.md', 'results.json', 'study.png')]


def _finished(run: StudyRun) -> RunResult | None:
    """Return the result in the run's file, None if there is no file."""
    if not run.file.exists():
        return None
    try:
        found = RunResult.from_json(json.loads(run.file.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f'{run.file} cannot be read ({error}); delete it to train the run anew') from None
    _check_same(run.file, found.config, run.config, 'delete it to train the run anew')
    return found


def _check_checkpoint(run: StudyRun) -> None:
    """Check that the run's checkpoint, if there is one, is of the same configuration."""
    folder = Path(str(run.recipe.save_folder))
    if not (folder / 'config.yaml').exists():
        return
    saved = config_of(OmegaConf.to_container(OmegaConf.load(folder / 'config.yaml')))  # pyright: ignore
    wanted = {key: value for key, value in run.config.items() if key != 'sharpness'}
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

"""Trains grids of recipes, values and seeds, goes on where it was cut off, and writes the tables."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from composer_sam.recipes import Recipe, RecipeError, load_recipe
from composer_sam.studies.parallel import RunError, make_folder, share_cores, train_all, with_seed
from composer_sam.studies.run import Sharpness, StudyRun, config_of, train_and_measure
from composer_sam.studies.tables import last_part, print_tables, value_text, write_report

__all__ = ['RunError', 'Sharpness', 'parse_grid', 'plan', 'study']

Grid = dict[str, list[Any]]

# Every run has these of its own.
_NOT_IN_A_GRID = {
    'seed': 'use --seeds',
    'name': 'runs are named by their values',
    'run_name': 'runs are named by their values',
    'grid': 'name the key itself',
    'base': 'name several recipes',
}


def study(
    paths: Sequence[str],
    overrides: Sequence[str] = (),
    grids: Sequence[str] = (),
    seeds: int = 1,
    out: Path = Path('study'),
    jobs: int | None = None,
    sharpness: Sharpness | None = Sharpness(),  # noqa: B008 (frozen)
    keep_checkpoints: bool = False,
) -> list[dict[str, Any]]:
    """Trains what ``out`` does not hold yet, and writes ``tables.md``, ``results.json`` and ``study.png`` there.

    Every finished run is one file in ``out/runs``. One that was cut off goes on from its newest checkpoint in
    ``out/checkpoints``, saved as often as the recipe's ``save_interval`` says.

    Args:
        paths: The recipes' files, each of which may have a ``grid``.
        overrides: ``dotted.key=value``, laid over every recipe.
        grids: ``dotted.key=value,value``, for the recipes that have the key, in place of what their own grid says
            about it.
        seeds: Runs at every point; the seeds are the recipe's own and those that follow it.
        out: Directory for results.
        jobs: Runs side by side; by default one per core, and one where a GPU is used.
        sharpness: How to measure the sharpness of every trained network; not at all if None.
        keep_checkpoints: Whether checkpoints stay in ``out/checkpoints`` when a run is done.

    Returns:
        What the runs' files hold, seed by seed.

    Raises:
        RecipeError: If a recipe, a grid or ``out`` is not valid, or ``out`` holds another study's runs.
        RunError: If runs failed; the others have been done, and are in the tables.
    """
    runs = plan(paths, overrides, grids, seeds, out, sharpness, keep_checkpoints)
    for folder in (out, out / 'runs'):
        make_folder(folder)
    done = {run.name: found for run in runs if (found := _finished(run)) is not None}
    missing = [run for run in runs if run.name not in done]
    for run in missing:
        _check_checkpoint(run)
    failures: list[Exception] = []
    if done and missing:
        Console(stderr=True, highlight=False).print(f'{len(done)} of {len(runs)} runs are done')
    if missing:
        by_name = {str(run.recipe.run_name): run for run in missing}

        def receive(recipe: Recipe, result: dict[str, Any] | Exception) -> None:
            if isinstance(result, RecipeError):
                raise result
            if isinstance(result, Exception):
                failures.append(result)
            else:
                done[by_name[str(recipe.run_name)].name] = result

        # By all runs, not those that are left: the number of threads decides the last bits of a result.
        jobs, threads = share_cores([run.recipe for run in runs], jobs)
        recipes = [run.recipe for run in missing]
        train_all(recipes, partial(train_and_measure, runs=by_name, sharpness=sharpness), receive, jobs, threads)
    results = [done[run.name] for run in runs if run.name in done]
    if results:
        files = write_report(results, out)
        print_tables(results)
        Console(highlight=False, markup=False).print(
            f'{len(results)} runs; {", ".join(map(str, files))}', soft_wrap=True
        )
    if failures:
        raise RunError(f'{len(failures)} of {len(runs)} runs failed: {"; ".join(map(str, failures))}')
    return results


def parse_grid(text: str) -> tuple[str, list[Any]]:
    """Splits ``key=value,value``; commas in brackets belong to a value."""
    key, equals, values = text.partition('=')
    if not equals or not re.fullmatch(r'[\w\-]+(\.[\w\-]+)*', key):
        raise RecipeError(f'--grid {text}: is not of the form dotted.key=value,value')
    parts = re.split(r',(?![^\[\]{}]*[\]}])', values)
    if not all(part.strip() for part in parts):
        raise RecipeError(f'--grid {text}: a value is empty; write {key}=value,value')
    return key, [OmegaConf.to_container(OmegaConf.from_dotlist([f'value={part}']))['value'] for part in parts]  # pyright: ignore


def plan(
    paths: Sequence[str],
    overrides: Sequence[str],
    grids: Sequence[str],
    seeds: int,
    out: Path,
    sharpness: Sharpness | None = None,
    keep_checkpoints: bool = False,
) -> list[StudyRun]:
    """All runs of a study, seed by seed, so that what was done when it is cut off has something of every method.

    Args:
        paths: See :func:`study`, as for all others.
        overrides: Laid over every recipe.
        grids: For the recipes that have the keys.
        seeds: Runs at every point.
        out: Directory for results.
        sharpness: Part of what a result follows from.
        keep_checkpoints: Passed on.
    """
    if not paths:
        raise RecipeError('study needs at least one recipe')
    if seeds < 1:
        raise RecipeError(f'--seeds must be an integer >= 1, got {seeds}')
    common = _common_grid(grids)
    recipes = [load_recipe(path, (), overrides) for path in paths]
    for key in common:
        if not any(_has(recipe, key) for recipe in recipes):
            raise RecipeError(f'--grid {key}: no recipe has it; {_nearby(recipes, key)}')
    points: list[tuple[str, Recipe, dict[str, Any]]] = []
    for path, recipe in zip(paths, recipes, strict=True):
        if recipe.save_folder is not None:
            raise RecipeError(
                f'save_folder: {path} has one, but a study keeps its checkpoints in --out; '
                'leave it out, and use --keep-checkpoints to have them afterwards'
            )
        for key in recipe.grid:
            _check_key(f'grid of {path}', key)
            if not _has(recipe, key):
                raise RecipeError(f'grid of {path}: the recipe does not have {key}; {_nearby([recipe], key)}')
        grid = recipe.grid | {key: values for key, values in common.items() if _has(recipe, key)}
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            # A recipe's values go the way of overrides, so that each point is checked as any recipe is.
            at_point = [f'{key}={json.dumps(value)}' for key, value in point.items()]
            points.append((path, load_recipe(path, (), [*overrides, *at_point]), point))
    runs = [
        _run(recipe, point, recipe.seed + offset, out, sharpness, keep_checkpoints)
        for offset in range(seeds)
        for _, recipe, point in points
    ]
    origins: dict[str, str] = {}
    for run, path in zip(runs, itertools.cycle([path for path, _, _ in points])):
        if run.name in origins:
            raise RecipeError(
                f'two runs are called {run.name!r}, of {origins[run.name]} and {path}; rename one of the recipes, or '
                'leave out a value that is there twice'
            )
        origins[run.name] = path
    return runs


def _run(
    recipe: Recipe, point: dict[str, Any], seed: int, out: Path, sharpness: Sharpness | None, keep_checkpoints: bool
) -> StudyRun:
    short = [last_part(key) for key in point]
    keys = [part if short.count(part) == 1 else key for key, part in zip(point, short, strict=True)]
    parts = [recipe.name, *(f'{key}={value_text(value)}' for key, value in zip(keys, point.values(), strict=True))]
    name = re.sub(r'[^\w.=+-]+', '-', '_'.join([*parts, f'seed={seed}']))
    seeded = with_seed(recipe, seed).model_copy(
        update={
            'run_name': name,
            'save_folder': str(out / 'checkpoints' / name),
            'autoresume': True,
            'grid': {},
            'trainer': {'save_num_checkpoints_to_keep': 1, **recipe.trainer, 'progress_bar': False},
        }
    )
    config = config_of(recipe.model_dump(exclude_none=True) | {'seed': seed})
    config['sharpness'] = None if sharpness is None else vars(sharpness)
    return StudyRun(name, seeded, point, config, out / 'runs' / f'{name}.json', keep_checkpoints)


def _common_grid(grids: Sequence[str]) -> Grid:
    found: Grid = {}
    for text in grids:
        key, values = parse_grid(text)
        _check_key('--grid', key)
        if key in found:
            raise RecipeError(f'--grid {key}: is given twice; list all values behind one')
        found[key] = values
    return found


def _check_key(origin: str, key: str) -> None:
    if key in _NOT_IN_A_GRID:
        raise RecipeError(f'{origin}: {key} cannot be in a grid; {_NOT_IN_A_GRID[key]}')


def _has(recipe: Recipe, key: str) -> bool:
    """Whether the recipe has the section a key is in; loading it with a value checks the key itself."""
    section: Any = recipe.model_dump()
    *parents, _ = key.split('.')
    for parent in parents:
        if not isinstance(section, dict) or not isinstance(section.get(parent), dict):
            return False
        section = section[parent]
    return True


def _nearby(recipes: Sequence[Recipe], key: str) -> str:
    """What the recipes have where a key they do not have would be."""
    section = key.split('.')[0]
    found = {f'{section}.{name}' for recipe in recipes for name in (getattr(recipe, section, None) or {})}
    if found:
        return f'there is {", ".join(sorted(found))}'
    return f'{section} is empty' if section in Recipe.model_fields else f'{section} is no key of a recipe'


def _finished(run: StudyRun) -> dict[str, Any] | None:
    """What the run's file holds, if there is one."""
    if not run.file.exists():
        return None
    try:
        found = json.loads(run.file.read_text())
        config = found['config']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f'{run.file} cannot be read ({error}); delete it to train the run anew') from None
    _check_same(run.file, config, run.config, 'delete it to train the run anew')
    return found


def _check_checkpoint(run: StudyRun) -> None:
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
    if not isinstance(config, dict) or not config:
        return {prefix.removesuffix('.'): config}
    return {key: value for name, item in config.items() for key, value in _flat(item, f'{prefix}{name}.').items()}

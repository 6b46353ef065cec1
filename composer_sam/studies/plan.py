"""The runs of a study: recipes, points of their grids, and seeds."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from composer_sam.files import file_name
from composer_sam.recipes import Recipe, RecipeError, load_recipe
from composer_sam.studies.parallel import with_seed
from composer_sam.studies.run import StudyRun, config_of
from composer_sam.studies.sharpness import Sharpness
from composer_sam.studies.texts import last_part, value_text

__all__ = ['StudyOptions', 'parse_grid', 'plan']

Grid = dict[str, list[Any]]

_log = logging.getLogger(__name__)

# Keys that cannot be in a grid, and what to use instead.
_NOT_IN_A_GRID = {
    'seed': 'use --seeds',
    'name': 'runs are named by their values',
    'run_name': 'runs are named by their values',
    'grid': 'name the key itself',
    'base': 'name several recipes',
}


@dataclass(frozen=True)
class StudyOptions:
    """What a study trains and measures, and where it stores the results.

    Attributes:
        paths: the files of the recipes, each of which may have a ``grid``, and overlays joined to it by ``+``.
        overrides: ``dotted.key=value``, laid over every recipe.
        grids: ``dotted.key=value,value``, for the recipes that have the key; they replace the values of the recipe's
            own grid.
        seeds: the number of runs at every point; their seeds are the recipe's own and those that follow it.
        out: the folder of the results.
        sharpness: how the sharpness of every trained network is measured; None not to measure it.
        keep_checkpoints: whether checkpoints are kept in ``out/checkpoints`` when a run is finished.
    """

    paths: Sequence[str]
    overrides: Sequence[str] = ()
    grids: Sequence[str] = ()
    seeds: int = 1
    out: Path = Path('study')
    sharpness: Sharpness | None = field(default_factory=Sharpness)
    keep_checkpoints: bool = False


@dataclass(frozen=True)
class _Point:
    """A recipe at one point of its grid."""

    path: str
    recipe: Recipe
    values: dict[str, Any]


def parse_grid(text: str) -> tuple[str, list[Any]]:
    """Split ``key=value,value``; commas in brackets belong to a value."""
    key, equals, values = text.partition('=')
    if not equals or not re.fullmatch(r'[\w\-]+(\.[\w\-]+)*', key):
        raise RecipeError(f'--grid {text}: is not of the form dotted.key=value,value')
    parts = re.split(r',(?![^\[\]{}]*[\]}])', values)
    if not all(part.strip() for part in parts):
        raise RecipeError(f'--grid {text}: a value is empty; write {key}=value,value')
    return key, [OmegaConf.to_container(OmegaConf.from_dotlist([f'value={part}']))['value'] for part in parts]  # pyright: ignore


def plan(options: StudyOptions, tell: Callable[[str], object] = _log.warning) -> list[StudyRun]:
    """Return all runs of a study, seed by seed, so that an interrupted study has runs of every method.

    Args:
        options: the recipes, grids and seeds.
        tell: called with the lines of :func:`~composer_sam.recipes.load_recipe`.

    Raises:
        RecipeError: a recipe or a grid is not valid, or two runs have the same name.
    """
    if not options.paths:
        raise RecipeError('study needs at least one recipe')
    if options.seeds < 1:
        raise RecipeError(f'--seeds must be an integer >= 1, got {options.seeds}')
    common = _common_grid(options.grids)
    recipes = [load_recipe(path, (), options.overrides, tell) for path in options.paths]
    for key in common:
        if not any(_has(recipe, key) for recipe in recipes):
            raise RecipeError(f'--grid {key}: no recipe has it; {_nearby(recipes, key)}')
    points = [
        point
        for path, recipe in zip(options.paths, recipes, strict=True)
        for point in _points(path, recipe, common, options.overrides, tell)
    ]
    origins: dict[str, str] = {}
    runs = []
    for offset in range(options.seeds):
        for point in points:
            run = _run(point, point.recipe.seed + offset, options)
            if run.name in origins:
                raise RecipeError(
                    f'two runs are called {run.name!r}, of {origins[run.name]} and {point.path}; rename one of the '
                    'recipes, or leave out a value that is there twice'
                )
            origins[run.name] = point.path
            runs.append(run)
    return runs


def _points(
    path: str, recipe: Recipe, common: Grid, overrides: Sequence[str], tell: Callable[[str], object]
) -> list[_Point]:
    """Return the points of a recipe's grid, with the recipe at each of them."""
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
    found = []
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        # As overrides, so that the recipe at every point is checked like any other recipe.
        at_point = [f'{key}={json.dumps(value)}' for key, value in point.items()]
        there = load_recipe(path, (), [*overrides, *at_point], tell)
        # The name of the recipe at all of its points, without what the command line of this one point would add.
        found.append(_Point(path, there.model_copy(update={'name': recipe.name}), point))
    return found


def _run(point: _Point, seed: int, options: StudyOptions) -> StudyRun:
    short = [last_part(key) for key in point.values]
    keys = [part if short.count(part) == 1 else key for key, part in zip(point.values, short, strict=True)]
    texts = [f'{key}={value_text(value)}' for key, value in zip(keys, point.values.values(), strict=True)]
    name = file_name('_'.join([point.recipe.name, *texts, f'seed={seed}']))
    seeded = with_seed(point.recipe, seed).model_copy(
        update={
            'run_name': name,
            'save_folder': str(options.out / 'checkpoints' / name),
            'autoresume': True,
            'grid': {},
            'trainer': {'save_num_checkpoints_to_keep': 1, **point.recipe.trainer, 'progress_bar': False},
        }
    )
    config = config_of(point.recipe, seed, options.sharpness)
    file = options.out / 'runs' / f'{name}.json'
    return StudyRun(name, seeded, point.values, config, file, options.keep_checkpoints)


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
    """Whether the recipe has the section of a key; the key itself is checked when it is loaded with a value."""
    section: Any = recipe.model_dump()
    *parents, _ = key.split('.')
    for parent in parents:
        if not isinstance(section, dict) or not isinstance(section.get(parent), dict):
            return False
        section = section[parent]
    return True


def _nearby(recipes: Sequence[Recipe], key: str) -> str:
    """Return a hint: what the recipes have in the section of a key that they do not have."""
    section = key.split('.')[0]
    found = {f'{section}.{name}' for recipe in recipes for name in (getattr(recipe, section, None) or {})}
    if found:
        return f'there is {", ".join(sorted(found))}'
    return f'{section} is empty' if section in Recipe.model_fields else f'{section} is no key of a recipe'

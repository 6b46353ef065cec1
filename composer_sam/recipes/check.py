"""The check of a whole recipe, before any data is read."""

from __future__ import annotations

from pathlib import Path

import torch
from composer.core import TimeUnit, ensure_time
from composer.devices import DeviceCPU
from composer.utils import get_device, parse_uri

from composer_sam.recipes.arguments import check_time
from composer_sam.recipes.components import build_components, build_optimizer, build_parallelism, trainer_arguments
from composer_sam.recipes.errors import RecipeError
from composer_sam.recipes.language_models import check_language_model
from composer_sam.recipes.own import check_own
from composer_sam.recipes.save_folder import check_folder
from composer_sam.recipes.schema import Recipe

__all__ = ['check_recipe']


def check_recipe(recipe: Recipe) -> None:
    """Check everything in a recipe that can be checked before any data is read.

    Components are constructed and discarded, because only their constructors know the ranges of their arguments.

    Raises:
        RecipeError: a value is not valid.
    """
    check_own(recipe.data, recipe.model)
    check_language_model(recipe.data, recipe.model)
    build_components(recipe)
    build_optimizer(recipe, [torch.nn.Parameter(torch.zeros(1))])
    trainer_arguments(recipe)
    build_parallelism(recipe)
    for key in ('max_duration', 'eval_interval', 'save_interval'):
        check_time(key, getattr(recipe, key))
    if ensure_time(recipe.max_duration, TimeUnit.EPOCH).value <= 0:
        raise RecipeError(f'max_duration: {recipe.max_duration!r} must be > 0')
    if recipe.early_stopping:
        _check_early_stopping(recipe)
    try:
        device = get_device(recipe.device)
    except ValueError as error:
        raise RecipeError(f'device: {recipe.device!r}: {error}') from None
    if isinstance(device, DeviceCPU) and recipe.precision != 'fp32':
        raise RecipeError(f"precision: {recipe.precision!r} does not run on the CPU; choose 'fp32'")
    if recipe.autoresume and recipe.save_folder is None:
        raise RecipeError('autoresume: true needs a save_folder to resume from')
    if recipe.load_path is not None and parse_uri(recipe.load_path)[0] == '' and not Path(recipe.load_path).exists():
        raise RecipeError(f'load_path: {recipe.load_path!r} does not exist')
    check_folder(recipe)


def _check_early_stopping(recipe: Recipe) -> None:
    if not recipe.data.validation_fraction:
        raise RecipeError('early_stopping: true needs validation images, and data.validation_fraction is 0; try 0.1')
    if ensure_time(recipe.eval_interval, TimeUnit.EPOCH).value <= 0:
        raise RecipeError(f'early_stopping: true needs tests, and eval_interval is {recipe.eval_interval!r}')
    if recipe.parallelism:
        raise RecipeError(
            'early_stopping: true keeps the weights of one process, and parallelism divides them among several; '
            'remove one of the two'
        )

"""Recipes: from a YAML file to Composer's Trainer."""

from composer_sam.recipes.build import build_trainer, check_recipe, load_recipe
from composer_sam.recipes.errors import RecipeError
from composer_sam.recipes.history import History, is_finished
from composer_sam.recipes.load import is_override
from composer_sam.recipes.schema import Recipe

__all__ = [
    'History',
    'Recipe',
    'RecipeError',
    'build_trainer',
    'check_recipe',
    'is_finished',
    'is_override',
    'load_recipe',
]

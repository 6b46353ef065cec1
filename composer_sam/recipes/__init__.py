"""Recipes: from a YAML file to a Composer Trainer."""

from composer_sam.extras import extra

with extra('composer', 'a recipe'):  # only to name the extra where one of them is not installed
    import composer  # noqa: F401
    import omegaconf  # noqa: F401
    import pydantic  # noqa: F401
    import torchvision  # noqa: F401

from composer_sam.recipes.build import build_trainer
from composer_sam.recipes.check import check_recipe
from composer_sam.recipes.divergence import Diverged
from composer_sam.recipes.errors import RecipeError
from composer_sam.recipes.history import History, is_finished
from composer_sam.recipes.load import is_override, load_recipe
from composer_sam.recipes.messages import messages
from composer_sam.recipes.progress import Progress, describe
from composer_sam.recipes.save_folder import as_yaml, newest_checkpoint
from composer_sam.recipes.schema import Recipe

__all__ = [
    'Diverged',
    'History',
    'Progress',
    'Recipe',
    'RecipeError',
    'as_yaml',
    'build_trainer',
    'check_recipe',
    'describe',
    'is_finished',
    'is_override',
    'load_recipe',
    'messages',
    'newest_checkpoint',
]

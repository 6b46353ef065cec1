"""The local folder for the checkpoints and the resolved recipe of a run."""

from __future__ import annotations

import os
from pathlib import Path

from composer.utils import format_name_with_dist, parse_uri
from omegaconf import OmegaConf

from composer_sam.files import make_writable, write_whole
from composer_sam.recipes.errors import RecipeError
from composer_sam.recipes.schema import Recipe

__all__ = ['as_yaml', 'check_folder', 'folder_of', 'make_folder', 'newest_checkpoint', 'save_config']


def folder_of(recipe: Recipe) -> Path | None:
    """Return the path that ``save_folder`` stands for, None if the recipe has none.

    Raises:
        RecipeError: it is not a local directory.
    """
    if recipe.save_folder is None:
        return None
    if parse_uri(recipe.save_folder)[0]:
        raise RecipeError(
            f'save_folder: {recipe.save_folder!r} is not a local directory; for an object store use '
            'callbacks.checkpoint_saver with its folder',
        )
    return Path(format_name_with_dist(recipe.save_folder, run_name=recipe.run_name or recipe.name))


def check_folder(recipe: Recipe) -> None:
    """Raise RecipeError if the folder cannot be written; nothing is created."""
    folder = folder_of(recipe)
    if folder is None:
        return
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise RecipeError(f'save_folder: {str(folder)!r} cannot be written, {str(existing)!r} is a file')
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RecipeError(f'save_folder: {str(folder)!r} cannot be written, no permission in {str(existing)!r}')


def make_folder(folder: Path) -> None:
    """Create the folder and raise RecipeError if it cannot be written."""
    try:
        make_writable(folder)
    except OSError as error:
        raise RecipeError(f'save_folder: {str(folder)!r} cannot be written: {error.strerror}') from None


def save_config(recipe: Recipe, folder: Path) -> None:
    """Write the resolved recipe to ``config.yaml`` in the folder."""
    write_whole(folder / 'config.yaml', as_yaml(recipe))


def as_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, from which it can be loaded again."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(exclude_none=True)))


def newest_checkpoint(recipe: Recipe) -> Path | None:
    """Return the checkpoint from which ``autoresume`` goes on, None if there is none yet."""
    folder = folder_of(recipe)
    if folder is None or not recipe.autoresume:
        return None
    name = recipe.trainer.get('save_latest_filename', 'latest-rank{rank}.pt')
    latest = folder / format_name_with_dist(name, run_name=recipe.run_name or recipe.name)
    return latest.parent / latest.resolve().name if latest.exists() else None

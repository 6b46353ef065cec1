"""From YAML files and command-line overrides to a checked recipe."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_sam.recipes.check import check_recipe
from composer_sam.recipes.errors import RecipeError, nearest
from composer_sam.recipes.models import plain_models
from composer_sam.recipes.schema import Recipe, parse_recipe

__all__ = ['COMPONENT_SECTIONS', 'is_override', 'load_mapping', 'load_recipe']

# Sections that map the name of a component to its arguments. In them null removes a component inherited from the base.
COMPONENT_SECTIONS = ('algorithms', 'callbacks', 'loggers')


def is_override(argument: str) -> bool:
    """Return whether a command-line argument is a ``dotted.key=value`` override and not the path of a file."""
    return re.match(r'[\w.\-]+=', argument) is not None


def load_recipe(
    path: str | Path,
    overlays: Sequence[str | Path] = (),
    overrides: Iterable[str] = (),
) -> Recipe:
    """Read, merge and check a recipe without building or training anything.

    Args:
        path: the YAML file of the recipe.
        overlays: further YAML files, each merged over the ones before it.
        overrides: ``dotted.key=value``, merged over all files.

    Raises:
        RecipeError: a file cannot be read or merged, or a value is not valid.
    """
    mapping = load_mapping(path, overlays, overrides)
    mapping.setdefault('name', Path(path).stem)
    recipe = parse_recipe(mapping, plain_models())
    check_recipe(recipe)
    return recipe


def load_mapping(
    path: str | Path, overlays: Sequence[str | Path] = (), overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """Read a recipe with its bases, merge the overlays and then the overrides, and resolve interpolations.

    A null removes a key that a base or an earlier overlay has set.
    """
    config = OmegaConf.create({})
    for file in (path, *overlays):
        config = _read(Path(file), (), config)
    config = _merge(config, _parse_overrides(overrides), 'the command line')
    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f'{error.full_key or path}: {error.msg or error}') from None
    return cast(dict[str, Any], _without_nulls(resolved))


def _read(path: Path, children: tuple[Path, ...], below: DictConfig) -> DictConfig:
    """Merge a file over ``below``, after the file that its ``base`` names (relative to it)."""
    if not path.is_file():
        raise RecipeError(f'recipe {str(path)!r} does not exist{_suggestion(path)}')
    if path.resolve() in children:
        raise RecipeError(f'{path}: base leads back to itself ({" -> ".join(map(str, (*children, path.resolve())))})')
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f'{path}: not valid YAML: {error}') from None
    if not isinstance(config, DictConfig):
        raise RecipeError(f'{path}: a recipe is a mapping of keys to values, got a list')
    base = config.pop('base', None)
    if base is None:
        return _merge(below, config, str(path))
    if not isinstance(base, str):
        raise RecipeError(f'base: must be the path of a recipe relative to {path}, got {base!r}')
    return _merge(_read(path.parent / base, (*children, path.resolve()), below), config, str(path))


def _merge(base: DictConfig, overlay: DictConfig, origin: str) -> DictConfig:
    """Merge ``overlay`` over ``base``; a null for a component that ``base`` does not have is an error."""
    for section in COMPONENT_SECTIONS:
        components = overlay.get(section)
        if not isinstance(components, DictConfig):
            continue
        for name in components:
            if components[name] is None and name not in (base.get(section) or {}):
                raise RecipeError(
                    f'{section}.{name}: null in {origin} removes an inherited component, and none is inherited; '
                    f'write {name}: {{}} to use it with its defaults',
                )
    try:
        return cast(DictConfig, OmegaConf.merge(base, overlay))
    except OmegaConfBaseException as error:
        raise RecipeError(f'{origin}: {error}') from None


def _parse_overrides(overrides: Iterable[str]) -> DictConfig:
    overrides = list(overrides)
    for override in overrides:
        if not is_override(override):
            raise RecipeError(f'override {override!r} is not of the form dotted.key=value')
    try:
        return OmegaConf.from_dotlist(overrides)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RecipeError(f'overrides {" ".join(overrides)!r}: {error}') from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _suggestion(path: Path) -> str:
    """Return a suggestion of existing recipes for a path that does not exist."""
    existing = next((parent for parent in path.parents if parent.is_dir()), Path())
    found = {str(match) for match in existing.glob('*.yaml')} | {str(match) for match in Path('yamls').rglob('*.yaml')}
    return f'; {nearest(str(path), found)}' if found else ''

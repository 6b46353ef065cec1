"""From YAML files and command-line overrides to one plain mapping."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_sam.recipes.errors import RecipeError, nearest

__all__ = ['COMPONENT_SECTIONS', 'is_override', 'load_mapping']

# Sections that map a component's name to its arguments; here a null removes a component inherited from the base.
COMPONENT_SECTIONS = ('algorithms', 'callbacks', 'loggers')


def is_override(argument: str) -> bool:
    """Whether a command-line ``argument`` is a ``dotted.key=value`` override rather than the path of a file."""
    return re.match(r'[\w.\-]+=', argument) is not None


def load_mapping(
    path: str | Path, overlays: Sequence[str | Path] = (), overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """Reads a recipe with its bases, lays the overlays and then the overrides over it, and resolves interpolations.

    A null means "as if the key had not been given": it removes what a base or an earlier overlay has set.
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
    """Lays one file, on the file its ``base`` names relative to it, over what is ``below``."""
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
    """Lays ``overlay`` over ``base``; refuses a null for a component that there is none of to remove."""
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
    """Which recipes there are near a ``path`` that does not exist."""
    existing = next((parent for parent in path.parents if parent.is_dir()), Path())
    found = {str(match) for match in existing.glob('*.yaml')} | {str(match) for match in Path('yamls').rglob('*.yaml')}
    return f'; {nearest(str(path), found)}' if found else ''

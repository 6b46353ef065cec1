"""From YAML files and command-line overrides to a checked recipe."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_sam import shipped
from composer_sam.recipes.check import check_recipe
from composer_sam.recipes.environment import from_environment
from composer_sam.recipes.errors import RecipeError
from composer_sam.recipes.layers import Layer, as_content, leaves, merge, overlay_line, removals
from composer_sam.recipes.models import plain_models
from composer_sam.recipes.naming import NamedFile, name_of, on_the_command_line
from composer_sam.recipes.own import refuse_functions
from composer_sam.recipes.parameters import COMPONENT_SECTIONS
from composer_sam.recipes.schema import Recipe, parse_recipe

__all__ = ['is_override', 'load_recipe']

_log = logging.getLogger(__name__)


def is_override(argument: str) -> bool:
    """Return whether a command-line argument is a ``dotted.key=value`` override and not the path of a file."""
    return re.match(r'[\w.\-]+=', argument) is not None


def load_recipe(
    path: str | Path,
    overlays: Sequence[str | Path] = (),
    overrides: Iterable[str] = (),
    tell: Callable[[str], object] = _log.warning,
    keys: Collection[str] = tuple(Recipe.model_fields),
    code: bool = True,
) -> Recipe:
    """Read, merge and check a recipe without building or training anything.

    A null removes a key that a base or an earlier overlay has set.

    Args:
        path: the YAML file of the recipe, or where there is no such file the name of a recipe that comes with the
            package: ``digits/sgd``; overlays can follow it, joined by ``+``: ``digits/sgd+gam.yaml``. The ending can be
            left out.
        overlays: further files or names, each merged over the ones before it.
        overrides: ``dotted.key=value``, merged over all files.
        tell: called with a line about every overlay, every component that is replaced by another and every key that is
            removed, if the recipe is valid.
        keys: the keys of the files that are used; the others are as if they were not there.
        code: whether functions that the files name may be imported.

    Raises:
        RecipeError: a file cannot be read or merged, or a value is not valid.
    """
    files = [one for given in (path, *overlays) for one in _split(given)]
    lines: list[str] = []
    named: list[NamedFile] = []
    nulls: dict[tuple[str, ...], bool] = {}
    merged: dict[str, Any] = {}
    for index, file in enumerate(files):
        chain = _chain(_find(file))
        if not code:
            for one, content in chain:
                refuse_functions(content, one)
        before, own = merged, {}
        for one, content in chain:
            replaced: list[str] = []
            merged = _merged(merged, Layer(str(one), content), replaced, nulls)
            # A file knows what its own base says: what is lost of it is said all the same.
            lines += replaced if index else [line for line in replaced if ': dropped ' in line]
            own = merge(own, Layer(str(one), content)) if index and len(chain) > 1 else content
        named.append(NamedFile(chain, own if index else merged, merged))
        if index:
            lines.append(overlay_line(file, files[:index], own, before))
    # What an overlay removes is in its line.
    merged = {section: _without_removed(section, content) for section, content in merged.items()}
    command_line = Layer('the command line', _parse_overrides(overrides))
    everything = _merged(merged, command_line, lines, nulls)
    everything['name'] = _name(named, merged, everything, command_line.content)
    resolved = _resolved(everything, path, Recipe.model_fields.keys() - set(keys) - command_line.content.keys())
    if not code:
        refuse_functions(resolved, path, given=command_line.content)
    recipe = parse_recipe(resolved, plain_models(), from_environment(everything, resolved))
    check_recipe(recipe)
    everything['name'] = recipe.name  # a null of a name is what it says: the next one is taken
    lines += removals(everything, nulls, recipe)
    for line in dict.fromkeys(lines):
        tell(line)
    return recipe


def _without_removed(section: str, content: Any) -> Any:
    if section not in COMPONENT_SECTIONS or not isinstance(content, dict):
        return content
    return {name: arguments for name, arguments in content.items() if arguments is not None}


def _name(files: Sequence[NamedFile], merged: dict[str, Any], everything: dict[str, Any], given: dict[str, Any]) -> Any:
    if given.get('name') is not None:
        return given['name']
    name = name_of(files, ignore_names='name' in given)
    return name + on_the_command_line(merged, everything) if isinstance(name, str) else name


def _merged(
    below: dict[str, Any], layer: Layer, lines: list[str], nulls: dict[tuple[str, ...], bool]
) -> dict[str, Any]:
    """Merge a layer, and note for each of its nulls whether a layer below has set the key."""
    was = {parts for parts, _ in leaves(below)}
    for parts, value in leaves(layer.content):
        if value is None:
            nulls[parts] = nulls.get(parts, False) or any(one[: len(parts)] == parts for one in was)
    return merge(below, layer, lines)


def _resolved(content: dict[str, Any], path: str | Path, left_out: Collection[str]) -> dict[str, Any]:
    config = OmegaConf.create(content)
    resolved = {}
    try:
        for key in content:
            if key not in left_out:  # an interpolation can still name them
                value = config[key]
                nested = isinstance(value, Container)
                resolved[key] = OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if nested else value
    except OmegaConfBaseException as error:
        raise RecipeError(f'{error.full_key or path}: {error.msg or error}') from None
    return cast(dict[str, Any], _without_nulls(resolved))


def _split(path: str | Path) -> list[str]:
    """Return the recipe and its overlays, which are joined by ``+``; a file can have a plus in its name."""
    text = os.fspath(path)
    return [text] if _file(Path(text)) else [part for part in text.split('+') if part] or [text]


def _file(path: Path) -> Path | None:
    """Return the file at a path, whose ending can be left out; None if there is none."""
    return next((file for file in (path, Path(f'{path}.yaml')) if file.is_file()), None)


def _find(text: str, folder: Path = Path()) -> Path:
    """Return the file at a path relative to a folder, or else the file of the shipped recipe of this name."""
    path = folder / text
    found = _file(path) or shipped.find(text)
    if found is None:
        written = text if folder == Path() else str(path)
        raise RecipeError(f'recipe {written!r} does not exist{_suggestion(path, text)}')
    return found


def _chain(path: Path, children: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """Return what a file says, after what its bases say (relative to it, or shipped), with their paths."""
    if path.resolve() in children:
        raise RecipeError(f'{path}: base leads back to itself ({" -> ".join(map(str, (*children, path.resolve())))})')
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f'{path}: not valid YAML: {error}') from None
    if not isinstance(config, DictConfig):
        raise RecipeError(f'{path}: a recipe is a mapping of keys to values, got a list')
    content = as_content(config)
    base = content.pop('base', None)
    if base is None:
        return [(path, content)]
    if not isinstance(base, str):
        raise RecipeError(
            f'base: must be the path of a recipe relative to {path}, or the name of one that composer-sam recipes '
            f'lists, got {base!r}'
        )
    return [*_chain(_find(base, path.parent), (*children, path.resolve())), (path, content)]


def _parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    overrides = list(overrides)
    for override in overrides:
        if not is_override(override):
            raise RecipeError(f'override {override!r} is not of the form dotted.key=value')
        key, _, value = override.partition('=')
        if not value.strip():
            raise RecipeError(
                f'{key}: has no value on the command line; give one, or write {key}=null to remove the key'
            )
    try:
        return as_content(OmegaConf.from_dotlist(overrides))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RecipeError(f'overrides {" ".join(overrides)!r}: {error}') from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _suggestion(path: Path, text: str) -> str:
    """Return a suggestion of the files and names that are the most similar to a path, written as ``text``."""
    existing = next((parent for parent in path.parents if parent.is_dir()), Path())
    found = {str(match) for match in existing.glob('*.yaml')} | {str(match) for match in Path('yamls').rglob('*.yaml')}
    suggestion = shipped.nearest(text, found)
    return f'; {suggestion}' if suggestion else '; there is no YAML file here'

"""Layers of a recipe, files and the command line, merged one over the other; what that means, in one line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_sam.recipes.components import same_name
from composer_sam.recipes.errors import RecipeError, unknown
from composer_sam.recipes.parameters import COMPONENT_SECTIONS, NAMED_SECTIONS, REQUIRED, parameters_of
from composer_sam.recipes.schema import Recipe

__all__ = ['Content', 'Layer', 'as_content', 'leaves', 'merge', 'overlay_line', 'removals']

Content = dict[str, Any]
Parts = tuple[str, ...]  # the parts of a dotted key


@dataclass(frozen=True)
class Layer:
    """What one file, without its base, or the command line says.

    Attributes:
        origin: the path of the file, or ``the command line``.
        content: its keys, with interpolations as they are written.
    """

    origin: str
    content: Content


def merge(below: Content, layer: Layer, lines: list[str] | None = None) -> Content:
    """Return ``below`` with the keys of the layer in place of its own.

    Where the layer changes the name of a component, arguments in ``below`` that the new one does not have are dropped.

    Args:
        below: the layers below, merged.
        layer: the layer.
        lines: gets a line for every component that is replaced.

    Raises:
        RecipeError: a null for a component that ``below`` does not have, or contents that cannot be merged.
    """
    _check_nulls(below, layer)
    replaced = dict(below)
    for section in NAMED_SECTIONS:
        old, new = below.get(section), layer.content.get(section)
        if not isinstance(old, dict) or not isinstance(new, dict):
            continue
        before, name = old.get('name'), new.get('name')
        if not isinstance(before, str) or not isinstance(name, str) or same_name(before, name):
            continue
        known = parameters_of(section, name)
        if known is None:
            continue  # there is no such component, or it is not known yet: the check of the recipe says so
        kept = {key: value for key, value in old.items() if key == 'name' or key in known.defaults}
        replaced[section] = kept
        if lines is not None:
            lines.append(_replaced(f'{section}.name={name} in place of {before}', old, kept, new))
    try:
        merged = OmegaConf.merge(OmegaConf.create(replaced), OmegaConf.create(layer.content))
    except OmegaConfBaseException as error:
        raise RecipeError(f'{layer.origin}: {error}') from None
    return as_content(cast(DictConfig, merged))


def as_content(config: DictConfig) -> Content:
    """Return a configuration as plain mappings, with interpolations as they are written."""
    return cast(Content, OmegaConf.to_container(config, resolve=False))


def leaves(content: Any, prefix: Parts = ()) -> Iterator[tuple[Parts, Any]]:
    """Return the values that are no mappings, and empty mappings, with the parts of their keys."""
    if not isinstance(content, Mapping) or not content:
        yield prefix, content
        return
    for key, value in content.items():
        yield from leaves(value, (*prefix, str(key)))


def overlay_line(overlay: str, over: Sequence[str], own: Content, before: Content) -> str:
    """Return a line about what an overlay replaces, adds and removes, and which algorithms it keeps.

    Args:
        overlay: the path of the overlay.
        over: the paths of the files below it.
        own: what the overlay says, with its base.
        before: what the files below it say, merged.
    """
    was = dict(leaves(before))
    changed: dict[str, list[str]] = {'replaced': [], 'added': [], 'removed': [], 'kept': []}
    for parts, value in leaves(own):
        if not parts:
            continue
        section, *name = parts
        if section in COMPONENT_SECTIONS and name and name[0] not in (before.get(section) or {}):
            key, kind = '.'.join(parts[:2]), 'added'
        elif value is None:
            key, kind = '.'.join(parts), 'removed'
        elif parts in was:
            key, kind = '.'.join(parts), '' if was[parts] == value else 'replaced'
        else:
            key, kind = '.'.join(parts), '' if value == {} else 'added'
        if kind and key not in changed[kind]:
            changed[kind].append(key)
    mine = own.get('algorithms') or {}
    changed['kept'] = [
        f'algorithms.{name}'
        for name, arguments in (before.get('algorithms') or {}).items()
        if name not in mine and arguments is not None
    ]
    said = '; '.join(f'{kind} {", ".join(keys)}' for kind, keys in changed.items() if keys)
    names = [Path(path).name for path in (*over, overlay)]
    *below, top = names if len(set(names)) == len(names) else (*over, overlay)
    return f'{top} over {"+".join(below)}: {said or "changes nothing"}'


def removals(content: Content, below: Mapping[tuple[str, ...], bool], recipe: Recipe) -> list[str]:
    """Return a line for every key that null removes: what is used instead of it.

    Args:
        content: all layers merged, with their nulls.
        below: for every null, by the parts of its key, whether a layer below had set the key.
        recipe: the recipe without these keys.

    Raises:
        RecipeError: a null for a key that is not known and that no layer has set.
    """
    lines = []
    for parts, value in leaves(content):
        if value is not None or not parts:
            continue
        key = '.'.join(parts)
        default = _in_its_place(parts, below.get(parts, True), recipe)
        if default is not None:
            lines.append(f'{key}=null: removed{default}')
    return lines


def _in_its_place(parts: tuple[str, ...], inherited: bool, recipe: Recipe) -> str | None:
    """Return what a null means: '; X is used'. Return None where null is simply the value of the key."""
    section = parts[0]
    if len(parts) == 1:
        if section not in Recipe.model_fields:
            raise unknown('key', section, None, section, Recipe.model_fields)
        value = getattr(recipe, section)
        return None if value is None else f'; the default {_text(value)} is used'
    if section in COMPONENT_SECTIONS and len(parts) == 2:
        return ''
    nested = section in COMPONENT_SECTIONS
    if len(parts) != (3 if nested else 2) or section not in (*COMPONENT_SECTIONS, *NAMED_SECTIONS, 'trainer'):
        return ''
    own: Any = getattr(recipe, section)
    name = parts[1] if nested else '' if section == 'trainer' else getattr(own, 'name', None) or own.get('name')
    known = parameters_of(section, name)
    if known is None or parts[-1] not in known.defaults:
        if known is not None and not known.takes_any and not inherited:
            raise unknown('key', '.'.join(parts), None, parts[-1], known.defaults)
        return ''
    default = getattr(own, parts[-1]) if hasattr(own, parts[-1]) and not nested else known.defaults[parts[-1]]
    if default is None or default is REQUIRED:
        return None
    return f"; {known.owner}'s default {_text(default)} is used"


def _replaced(what: str, old: Content, kept: Content, new: Content) -> str:
    """Return a line about what a component with another name keeps of the arguments of the old one."""
    dropped = [key for key in old if key not in kept]
    remain = [f'{key}={_text(value)}' for key, value in kept.items() if key not in new and value is not None]
    parts = [f'dropped {", ".join(dropped)}'] * bool(dropped) + [f'kept {", ".join(remain)}'] * bool(remain)
    return f'{what}: {"; ".join(parts)}' if parts else what


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_nulls(below: Content, layer: Layer) -> None:
    for section in COMPONENT_SECTIONS:
        components = layer.content.get(section)
        if not isinstance(components, dict):
            continue
        for name, arguments in components.items():
            inherited = below.get(section)
            if arguments is None and name not in (inherited if isinstance(inherited, dict) else {}):
                raise RecipeError(
                    f'{section}.{name}: null in {layer.origin} removes an inherited component, and none is inherited; '
                    f'write {name}: {{}} to use it with its defaults',
                )

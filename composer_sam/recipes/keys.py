"""The keys of a recipe, as the schema declares them: name, type, default and meaning."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from composer_sam.recipes.schema import DATA, MODELS, Recipe

__all__ = ['Key', 'all_keys']


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Attributes:
        name: the dotted key.
        type: the values it takes.
        default: its default, None where the key is required.
        meaning: what it is.
    """

    name: str
    type: str
    default: str | None
    meaning: str


def all_keys() -> dict[str, list[Key]]:
    """Return all keys by section; the keys of ``data`` and ``model`` are those of each of their names."""
    found = {'in every recipe': _keys(Recipe, '')}
    for section, known in (('data', DATA), ('model', MODELS)):
        for cls, names in _by_class(known).items():
            found[f'with {section}.name: {" or ".join(names)}'] = _keys(cls, f'{section}.', without='name')
    return found


def _by_class(known: Mapping[str, type[BaseModel]]) -> dict[type[BaseModel], list[str]]:
    found: dict[type[BaseModel], list[str]] = {}
    for name, cls in known.items():
        found.setdefault(cls, []).append(name)
    return found


def _keys(cls: type[BaseModel], prefix: str, without: str = '') -> list[Key]:
    meanings = _meanings(cls)
    return [
        Key(f'{prefix}{name}', _type(cls, name, field), _default(field), meanings[name])
        for name, field in cls.model_fields.items()
        if name != without
    ]


def _default(field: FieldInfo) -> str | None:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return None
    if default is None:
        return 'none'
    return str(default).lower() if isinstance(default, bool) else str(default)


def _type(cls: type[BaseModel], name: str, field: FieldInfo) -> str:
    """Return the values that a key takes, in words, from the JSON schema of its section."""
    if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
        return 'section'
    return _words(cls.model_json_schema()['properties'][name])


def _words(schema: dict[str, object]) -> str:
    if isinstance(alternatives := schema.get('anyOf'), list):
        return ' or '.join(words for one in alternatives if (words := _words(one)) != 'null')
    if isinstance(values := schema.get('enum'), list):
        return ' | '.join(map(str, values))
    if 'const' in schema:
        return str(schema['const'])
    kind = str(schema.get('type', 'any value'))
    if kind == 'array':
        items = schema.get('items')
        inner = _words(items) if isinstance(items, dict) else 'any value'
        return f'list of {inner}'
    signs = {'exclusiveMinimum': '>', 'minimum': '>=', 'exclusiveMaximum': '<', 'maximum': '<='}
    bounds = ' and '.join(f'{sign} {schema[key]:g}' for key, sign in signs.items() if key in schema)  # pyright: ignore
    names = {'object': 'mapping', 'boolean': 'true | false'}
    return ' '.join(filter(None, [names.get(kind, kind), bounds]))


def _meanings(cls: type[BaseModel]) -> dict[str, str]:
    """Return the meaning of every key, from the docstrings of a section and of those it inherits from."""
    found: dict[str, str] = {}
    for ancestor in reversed(cls.__mro__):
        doc = inspect.cleandoc(ancestor.__dict__.get('__doc__') or '')
        section = doc.partition('Attributes:\n')[2]
        entries = re.findall(r'^    (\w+): (.*(?:\n {8}.*)*)', section, flags=re.MULTILINE)
        found |= {name: _without_roles(' '.join(text.split())) for name, text in entries}
    return found


def _without_roles(text: str) -> str:
    """Return a docstring's text without reStructuredText's marks."""
    return re.sub(r':\w+:`([^`]*)`', r'\1', text).replace('``', '')

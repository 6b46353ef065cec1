"""The commands that tell what there is to train: ``recipes`` and ``keys``."""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path

from composer_sam.commands.terminal import MISTAKE, OK, Commands, complain

__all__ = ['add']

_FOLDER = Path('yamls')
_WIDTH = 100  # of the meanings of keys, which are prose


def add(commands: Commands) -> None:
    """Add both commands to the parser."""
    recipes = commands.add_parser(
        'recipes', help='list the recipes under yamls/', description=_recipes.__doc__, allow_abbrev=False
    )
    recipes.set_defaults(command=_recipes)
    keys = commands.add_parser('keys', help='list the keys of a recipe', description=_keys.__doc__, allow_abbrev=False)
    keys.set_defaults(command=_keys)


def _recipes(options: argparse.Namespace) -> int:
    """List the recipes under yamls/ in the current folder, with their names and what they are."""
    del options
    files = sorted(_FOLDER.rglob('*.yaml'), key=lambda path: (path.parent, path.name))
    if not files:
        complain('there is no yamls/ with recipes in the current folder; run it in a clone of the repository')
        return MISTAKE
    for path in files:
        print(f'{path}  {_name(path)}\n    {_about(path)}')
    return OK


def _keys(options: argparse.Namespace) -> int:
    """List every key of a recipe with its type, its default and its meaning."""
    del options
    from composer_sam.recipes.keys import all_keys

    for title, keys in all_keys().items():
        print(title)
        for key in keys:
            print(f'  {key.name}: {key.type}, {"required" if key.default is None else f"default {key.default}"}')
            print(textwrap.fill(key.meaning, _WIDTH, initial_indent='      ', subsequent_indent='      '))
    return OK


def _name(path: Path) -> str:
    """Return the name that a recipe or the recipe it is based on gives; the name of the file if none does."""
    seen: set[Path] = set()
    file: Path | None = path
    while file is not None and file.is_file() and file.resolve() not in seen:
        seen.add(file.resolve())
        text = file.read_text()
        if (name := _value(text, 'name')) is not None:
            return name
        base = _value(text, 'base')
        file = None if base is None else file.parent / base
    return path.stem


def _value(text: str, key: str) -> str | None:
    """Return the value of a key at the top of a YAML file, without what parses YAML."""
    found = re.search(rf'^{key}:[ \t]*(.*?)(?:[ \t]+#.*)?$', text, flags=re.MULTILINE)
    return found[1].strip('\'"') if found and found[1] else None


def _about(path: Path) -> str:
    """Return the first sentence of the comment at the top of a file, up to a colon."""
    comment = re.match(r'(?:# \S.*\n)*', path.read_text())
    text = ' '.join(line.removeprefix('# ') for line in comment[0].splitlines()) if comment else ''
    return re.split(r'[.:](?:\s|$)', text, maxsplit=1)[0]

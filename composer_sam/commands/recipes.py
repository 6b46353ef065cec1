"""The commands that tell what there is to train: ``recipes`` and ``keys``."""

from __future__ import annotations

import argparse
import re
import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path

from composer_sam import shipped
from composer_sam.commands.terminal import FAILED, MISTAKE, OK, Commands, complain
from composer_sam.files import make_writable, write_whole

__all__ = ['add']

_WIDTH = 100  # of the meanings of keys, which are prose
_OVERLAYS = 'methods/'
_AS_AN_OVERLAY = ', as an overlay for any recipe'


def add(commands: Commands) -> None:
    """Add both commands to the parser."""
    recipes = commands.add_parser(
        'recipes',
        help='list the recipes that come with composer-sam; copy one',
        description=_recipes.__doc__,
        allow_abbrev=False,
    )
    recipes.set_defaults(command=_recipes)
    further = recipes.add_subparsers(metavar='COMMAND')
    copy = further.add_parser(
        'copy', help='write a recipe into a folder, to change it', description=_copy.__doc__, allow_abbrev=False
    )
    copy.add_argument('name', metavar='NAME', help='such as digits/sam')
    copy.add_argument(
        'folder', nargs='?', type=Path, default=Path(), metavar='FOLDER', help='default: the current folder'
    )
    copy.set_defaults(command=_copy)
    keys = commands.add_parser('keys', help='list the keys of a recipe', description=_keys.__doc__, allow_abbrev=False)
    keys.set_defaults(command=_keys)


def _recipes(options: argparse.Namespace) -> int:
    """List the recipes that come with composer-sam, with the names of their runs and what they are.

    A command that takes the file of a recipe takes these names too. A file of the same name is used instead.
    """
    del options
    files = shipped.recipes()
    if not files:
        complain(shipped.MISSING)
        return MISTAKE
    print('Recipes: composer-sam train NAME; composer-sam recipes copy NAME FOLDER to start one of your own\n')
    for name, path in files.items():
        if not name.startswith(_OVERLAYS):
            print(f'{name}  {_name(path)}\n    {_about(path)}')
    print('\nOverlays, merged into a recipe: composer-sam train RECIPE NAME\n')
    for name, path in files.items():
        if name.startswith(_OVERLAYS):
            print(f'{name}  {_name(path)}\n    {_about(path).removesuffix(_AS_AN_OVERLAY)}')
    return OK


def _copy(options: argparse.Namespace) -> int:
    """Write a recipe that comes with composer-sam, and the recipes it is based on, into a folder.

    No file is overwritten. A base that is there already, and is the same, stays.
    """
    name, folder = shipped.name_of(options.name), options.folder
    if name not in shipped.recipes():
        suggestion = shipped.nearest(options.name) or shipped.MISSING
        complain(f'recipes copy: there is no recipe {options.name!r}; {suggestion}')
        return MISTAKE
    if folder.suffix == '.yaml':
        complain(f'recipes copy: a folder is needed, got {str(folder)!r}; the file keeps the name of the recipe')
        return MISTAKE
    texts = {folder / file: text for file, text in shipped.copies(name).items()}
    recipe, *bases = texts
    for path, text in texts.items():
        if (path.exists() or path.is_symlink()) and (path == recipe or not _holds(path, text)):
            differs = '' if path == recipe else f' and differs from the one that {recipe.name} is based on'
            complain(f'recipes copy: {str(path)!r} exists{differs}; choose another folder. Nothing was written')
            return MISTAKE
    new = {path: text for path, text in texts.items() if not path.exists()}
    try:
        make_writable(folder)
        _write(new)
    except OSError as error:
        complain(f'recipes copy: {str(folder)!r} cannot be written: {error.strerror}')
        return FAILED if folder.is_dir() else MISTAKE
    below = [str(path) for path in bases if path in new]
    based = f' and what it is based on, {", ".join(below)}' if below else ''
    kept = ''.join(f'; {path} was there' for path in bases if path not in new)
    run = shlex.join(['composer-sam', 'train', *(['digits/sgd'] if name.startswith(_OVERLAYS) else []), str(recipe)])
    print(f'wrote {recipe}{based}{kept}; run it: {run}')
    return OK


def _write(texts: Mapping[Path, str]) -> None:
    """Write all of the files, in reverse, so that a recipe is never there without what it is based on, or none."""
    written: list[Path] = []
    try:
        for path in reversed(list(texts)):
            write_whole(path, texts[path])
            written.append(path)
    except BaseException:
        for path in written:
            path.unlink()
        raise


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


def _holds(path: Path, text: str) -> bool:
    """Return whether a file has this text."""
    try:
        return path.read_text(encoding='utf-8') == text
    except (OSError, UnicodeDecodeError):
        return False


def _name(path: Path) -> str:
    """Return the name that a recipe or the recipe it is based on gives; the name of the file if none does."""
    seen: set[Path] = set()
    file: Path | None = path
    while file is not None and file.is_file() and file.resolve() not in seen:
        seen.add(file.resolve())
        text = file.read_text(encoding='utf-8')
        if (name := shipped.value(text, 'name')) is not None:
            return name
        base = shipped.value(text, 'base')
        file = None if base is None else file.parent / base
    return path.stem


def _about(path: Path) -> str:
    """Return the first sentence of the comment at the top of a file, up to a colon."""
    comment = re.match(r'(?:# \S.*\n)*', path.read_text(encoding='utf-8'))
    text = ' '.join(line.removeprefix('# ') for line in comment[0].splitlines()) if comment else ''
    return re.split(r'[.:](?:\s|$)', text, maxsplit=1)[0]

"""The recipes that travel with the package, by name: ``digits/sam`` is ``yamls/digits/sam.yaml``.

Nothing is imported that takes time, so that the command line lists them at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ['MISSING', 'copies', 'expanded', 'find', 'name_of', 'nearest', 'recipes', 'value']

# Where the package is installed, the recipes lie inside it; in a clone, beside it.
_PACKAGE = Path(__file__).parent
_FOLDERS = (_PACKAGE / 'yamls', _PACKAGE.parent / 'yamls')

MISSING = 'the recipes are missing from this installation; install composer-sam again'


def recipes() -> dict[str, Path]:
    """Return the files of the recipes and overlays by their names, folder by folder."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    if folder is None:
        return {}
    files = sorted(folder.rglob('*.yaml'), key=lambda file: (file.parent, file.name))
    return {file.relative_to(folder).with_suffix('').as_posix(): file for file in files}


def name_of(text: str) -> str:
    """Return the name that a text spells, with or without ``yamls/`` and ``.yaml``; there need not be such a recipe.

    >>> name_of('yamls/digits/sam.yaml')
    'digits/sam'
    """
    return text.removeprefix('yamls/').removesuffix('.yaml')


def find(text: str) -> Path | None:
    """Return the file of the recipe that a text names, None if there is none."""
    return recipes().get(name_of(text))


def expanded(text: str) -> list[str]:
    """Return the names that a pattern with ``*`` stands for, as a shell does it with files; the text if there are none.

    >>> expanded('study/digits/sam*')[0]
    'study/digits/sam'
    """
    if '*' not in text:
        return [text]
    pattern = re.escape(name_of(text)).replace(r'\*', '[^/]*')
    return [name for name in recipes() if re.fullmatch(pattern, name)] or [text]


def nearest(text: str, others: Iterable[str] = ()) -> str | None:
    """Return a suggestion of the names, spelled as a text is, and others that are similar to it; None without any.

    >>> nearest('yamls/digits/sma.yaml')
    'did you mean yamls/digits/sam.yaml or yamls/digits/sgd.yaml or yamls/study/digits/sam.yaml?'
    """
    before, after = 'yamls/' * text.startswith('yamls/'), '.yaml' * text.endswith('.yaml')
    known = {f'{before}{name}{after}' for name in recipes()}
    close = difflib.get_close_matches(text, sorted(known.union(others)), n=3, cutoff=0.0)
    return f'did you mean {" or ".join(close)}?' if close else None


def copies(name: str) -> dict[str, str]:
    """Return the texts of a recipe and of those it is based on by file name, as they lie side by side in one folder.

    A base that has the name of a file before it gets that of its folder too: ``digits_sgd.yaml``.

    Args:
        name: the name of a recipe that there is.
    """
    file = recipes()[name]
    target = file.name
    found: dict[str, str] = {}
    while True:
        text = file.read_text(encoding='utf-8')
        base = value(text, 'base')
        if base is None:
            return {**found, target: text}
        file = (file.parent / base).resolve()
        beside = f'{file.parent.name}_{file.name}' if file.name in (*found, target) else file.name
        found[target] = text.replace(base, beside)  # in the comments too
        target = beside


def value(text: str, key: str) -> str | None:
    """Return the value of a key at the top of a YAML file, without what parses YAML.

    >>> value('name: SAM  # of the run', 'name')
    'SAM'
    """
    found = re.search(rf'^{key}:[ \t]*(.*?)(?:[ \t]+#.*)?$', text, flags=re.MULTILINE)
    return found[1].strip('\'"') if found and found[1] else None

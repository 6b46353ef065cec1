"""The documents of a text, from each kind of source that a recipe can name, in an order that is always the same."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_sam.extras import extra
from composer_sam.recipes.errors import RecipeError
from composer_sam.recipes.text_schema import Text

__all__ = ['Document', 'read_documents']

# Folders of the standard library that are not its sources, or not on every machine.
_NOT_SOURCES = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'lib2to3', 'pydoc_data', '__pycache__'}
_JSON_LINES = ('.jsonl', '.ndjson', '.json')


@dataclass(frozen=True)
class Document:
    """A text and its name, which decides whether it is for training or for testing."""

    name: str
    text: str

    @property
    def place(self) -> float:
        """A number in [0, 1) that depends on the name only, and is as good as random: the split goes by it."""
        return _hashed(self.name)


def read_documents(section: Text, key: str, root: str | None) -> list[Document]:
    """Read the documents of a source, up to ``max_bytes``; empty ones are left out.

    Args:
        section: the section ``data`` of a recipe.
        key: the key that names the source, for messages: ``data.root`` or ``data.test_root``.
        root: the path of the text; None for the text of ``data.source``, which comes with Python.

    Raises:
        RecipeError: it cannot be read, or holds no text.
    """
    found: Iterable[Document]
    if root is not None:
        what, found = repr(root), _of_path(section, key, Path(root))
    else:
        what, found = section.source, {'python': _python_sources, 'pydoc': _pydoc_topics}[section.source]()
    documents = list(_capped((one for one in found if one.text.strip()), section.max_bytes))
    if not documents:
        raise RecipeError(f'{key}: {what} holds no text')
    return documents


def _capped(documents: Iterable[Document], most: int | None) -> Iterator[Document]:
    left = most
    for document in documents:
        if left is None:
            yield document
            continue
        if left <= 0:
            return
        encoded = document.text.encode('utf-8', 'replace')
        yield Document(document.name, encoded[:left].decode('utf-8', 'ignore'))
        left -= len(encoded)


def _hashed(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode('utf-8', 'replace')).digest()[:6], 'big') / 2**48


def _shuffled(names: Iterable[str]) -> list[str]:
    """Return names in an order that is as good as random, always the same, and has nothing to do with the split."""
    return sorted(names, key=lambda name: (_hashed(f'order: {name}'), name))


def _files(root: Path, paths: Iterable[Path]) -> Iterator[Document]:
    names = {path.relative_to(root).as_posix(): path for path in paths}
    for name in _shuffled(names):
        yield Document(name, names[name].read_bytes().decode('utf-8', 'replace'))


def _python_sources() -> Iterator[Document]:
    """Return the source files of the standard library of the running Python."""
    root = Path(sysconfig.get_paths()['stdlib'])
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [one for one in folders if one not in _NOT_SOURCES and not one.startswith('config-')]
        # _sysconfigdata says how this very Python was built.
        found += [Path(folder, one) for one in files if one.endswith('.py') and not one.startswith('_sysconfigdata')]
    return _files(root, found)


def _pydoc_topics() -> Iterator[Document]:
    """Return the topics of the language reference."""
    from pydoc_data.topics import topics

    for name in _shuffled(topics):
        yield Document(name, topics[name])


def _of_path(section: Text, key: str, root: Path) -> Iterator[Document]:
    """Return the documents of a path of the user's, by what lies there."""
    if not root.exists():
        raise RecipeError(f'{key}: {str(root)!r} does not exist')
    if root.is_file():
        if root.suffix in _JSON_LINES:
            return _json_lines(section, key, root)
        return iter([Document(root.name, root.read_bytes().decode('utf-8', 'replace'))])
    inside = {entry.name for entry in root.iterdir()}
    if 'dataset_dict.json' in inside:
        splits = ', '.join(sorted(entry.name for entry in root.iterdir() if entry.is_dir()))
        raise RecipeError(f'{key}: {str(root)!r} holds several data sets ({splits}); name one of these folders')
    if {'dataset_info.json', 'state.json'} <= inside:
        return _saved_dataset(section, key, root)
    if 'index.json' in inside:
        return _shards(section, key, root)
    files = {path for pattern in section.pattern for path in root.rglob(pattern) if path.is_file()}
    if not files:
        raise RecipeError(f'data.pattern: no file in {str(root)!r} matches {" or ".join(map(repr, section.pattern))}')
    return _files(root, files)


def _json_lines(section: Text, key: str, path: Path) -> Iterator[Document]:
    with path.open(encoding='utf-8', errors='replace') as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f'line {number} of {str(path)!r}'
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise RecipeError(f'{key}: {where} is no JSON: {error.msg}') from None
            yield Document(str(number), _value(section.key, record, where))


def _saved_dataset(section: Text, key: str, root: Path) -> Iterator[Document]:
    with extra('lm-data', 'a data set of Hugging Face'):
        import datasets  # pyright: ignore[reportMissingImports]
    try:
        found: Any = datasets.load_from_disk(str(root))
    except Exception as error:  # pyarrow's errors have no base of their own
        raise RecipeError(f'{key}: {str(root)!r} is no data set that can be read: {error}') from error
    return _records(section, found, repr(str(root)))


def _shards(section: Text, key: str, root: Path) -> Iterator[Document]:
    # Such a column is a pickle, which can run anything when it is read.
    if '"pkl"' in (root / 'index.json').read_text(encoding='utf-8', errors='replace'):
        raise RecipeError(f"{key}: {str(root)!r} has a column in the encoding 'pkl'; reading it would run its code")
    with extra('lm-data', 'MDS shards'):
        from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]
    try:
        found = StreamingDataset(local=str(root), shuffle=False, batch_size=1)
    except Exception as error:  # the shards' own errors have no base of their own
        raise RecipeError(f'{key}: {str(root)!r} holds no shards that can be read: {error}') from error
    return _records(section, found, repr(str(root)))


def _records(section: Text, records: Any, what: str) -> Iterator[Document]:
    """Return the texts of a data set of records; its names are their numbers."""
    for number in range(len(records)):
        yield Document(str(number + 1), _value(section.key, records[number], f'record {number + 1} of {what}'))


def _value(key: str, record: Any, where: str) -> str:
    if not isinstance(record, dict):
        raise RecipeError(f'data.key: {where} must be a mapping with the key {key!r}, got {type(record).__name__}')
    if key not in record:
        raise RecipeError(f'data.key: {where} has no {key!r}; it has {", ".join(map(repr, record)) or "no keys"}')
    if not isinstance(record[key], str):
        raise RecipeError(f'data.key: {key!r} in {where} must be a text, got {type(record[key]).__name__}')
    return record[key]

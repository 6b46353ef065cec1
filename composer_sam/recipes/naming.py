"""The name of a run, which follows what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer_sam.methods import registry
from composer_sam.recipes.components import same_name
from composer_sam.recipes.layers import Content, leaves
from composer_sam.recipes.parameters import NAMED_SECTIONS

__all__ = ['NamedFile', 'name_of', 'on_the_command_line']


class NamedFile:
    """One of the files that a user has listed, with its bases.

    Args:
        chain: the paths of the bases and of the file, the file last, with what each of them says.
        own: what they say, merged.
        merged: the same over all files listed before.
    """

    def __init__(self, chain: Sequence[tuple[Path, Content]], own: Content, merged: Content) -> None:
        self.chain = chain
        self.own = own
        self.merged = merged


def name_of(files: Sequence[NamedFile], ignore_names: bool = False) -> Any:
    """Return the name that the files give: that of the last ``name``, or of the recipe's file, and what differs.

    A file that sets no name adds its own: ``SGD+longer``. A file that sets the name, and keeps a method of the files
    before it, names that too: ``SGD with sam``.

    Args:
        files: the recipe and the overlays.
        ignore_names: whether ``name`` is null on the command line.
    """
    found: Any = None
    for file in files:
        set_here = False
        for path, content in file.chain:
            if 'name' in content and not ignore_names:
                found = path.stem if content['name'] is None else content['name']
                set_here = True
            elif isinstance(found, str):
                found += f'+{path.stem}'
        if found is None:
            found = file.chain[-1][0].stem
        if set_here and isinstance(found, str):
            mine = file.own.get('algorithms') or {}
            found += _with([name for name in _present(file.merged) if name not in mine and _is_method(name)])
    return found


def on_the_command_line(before: Content, after: Content) -> str:
    """Return what to add to the name for components, and arguments of components, that the command line changes.

    Args:
        before: the files, merged.
        after: the same below the command line.
    """
    was, now = _present(before), _present(after)
    added, removed = ([name for name in one if name not in other] for one, other in ((now, was), (was, now)))
    said = _with(added) + (f' without {" and ".join(removed)}' if removed else '')
    for section in NAMED_SECTIONS:
        old, new = (_name(content, section) for content in (before, after))
        if new is not None and (old is None or not same_name(old, new)):
            said += f', {section}={new}'
    held = dict(leaves(before))
    for parts, value in leaves(after):
        section, *inner = parts or ('',)
        ours = section == 'algorithms' and len(inner) > 1 and inner[0] in was and inner[0] in now
        if (ours or (section == 'model' and inner != ['name'])) and inner and held.get(parts, ...) != value:
            said += f', {inner[-1]}={"null" if value is None else value}'
    return said.replace('/', '-')  # names are parts of paths too


def _with(names: Sequence[str]) -> str:
    return f' with {" and ".join(names)}' if names else ''


def _present(content: Content) -> list[str]:
    """Return the names of the algorithms that are not removed."""
    algorithms = content.get('algorithms')
    if not isinstance(algorithms, dict):
        return []
    return [str(name) for name, value in algorithms.items() if value is not None]


def _is_method(name: str) -> bool:
    return any(same_name(name, known) for known in registry)


def _name(content: Content, section: str) -> str | None:
    named = content.get(section)
    found = named.get('name') if isinstance(named, dict) else None
    return found if isinstance(found, str) else None

"""Prints docs/methods.md, generated from the registry: ``python -m composer_sam.methods > docs/methods.md``."""

from __future__ import annotations

import dataclasses
import inspect
import re

from composer_sam.methods import own_fields, registry, table
from composer_sam.methods.base import SharpnessAware

__all__: list[str] = []  # what is public is in the package

_HEAD = """\
# The methods

Generated from the code by `python -m composer_sam.methods > docs/methods.md`; a test keeps it up to date. The update
rules themselves are in the docstrings, `help(composer_sam.SAM)`, and in `composer_sam/methods/`, one file per method.
"""
_COLUMNS = """
Passes are forward-backward passes of a perturbing step, and collectives are its exchanges of gradients over the ranks
of DistributedDataParallel, where an ordinary step has one. Both are counted on the rules. Memory is what it adds to the
base step's at the peak, in copies of the parameters, as `benchmarks/memory.py` measures it; between steps nothing is
held. SGDHess's comes on top of the graph that its backward keeps.
"""
_SHARED = """
## What every method takes

SGDHess refuses `sync_first_pass`: it averages its gradient and the curvature over ranks itself.
"""


def document() -> str:
    """The page."""
    parts = [_HEAD, '\n', _rows('method', 'passes', 'memory', 'collectives', 'what it is')]
    for row in table():
        link = f'[{row["name"]}](#{row["name"].lower()})'
        parts.append(_row(link, row['passes'], row['extra_copies'], row['collectives'], row['summary']))
    parts.append(_COLUMNS)
    for row in table():
        method = registry[row['name']]
        recipe = method.__module__.split('.')[-1]
        parts.append(f'\n## {row["name"]}\n\n{row["summary"]}\n\n{row["paper"]}. Overlay for recipes: ')
        parts.append(f'[{recipe}.yaml](../yamls/methods/{recipe}.yaml).\n\n')
        parts.append(_hyperparameters(method, own_fields(method)))
    parts += [_SHARED, '\n', _hyperparameters(SharpnessAware, list(dataclasses.fields(SharpnessAware)))]
    return ''.join(parts)


def _hyperparameters(method: type[SharpnessAware], fields: list[dataclasses.Field]) -> str:
    meanings = _meanings(inspect.getdoc(method) or '')
    rows = [_row(f'`{f.name}`', f'`{f.default!r}`', _range(f), meanings[f.name]) for f in fields]
    return _rows('hyper-parameter', 'default', 'range', 'meaning') + ''.join(rows)


def _range(field: dataclasses.Field) -> str:
    if 'choices' in field.metadata:
        return ', '.join(f'`{choice!r}`' for choice in field.metadata['choices'])
    if 'range' in field.metadata:
        bounds = ' and '.join(f'{sign} {bound:g}'.replace('>=', '≥') for sign, bound in field.metadata['range'].bounds)
        return (bounds or 'any number') + (', or `None`' if field.default is None else '')
    if isinstance(field.default, bool):
        return '`True`, `False`'
    return 'integer ≥ 1' if isinstance(field.default, int) else ''


def _meanings(doc: str) -> dict[str, str]:
    """What a docstring's ``Args`` say of each argument, as Markdown."""
    section = re.split(r'\n\n', doc.split('Args:\n', 1)[1], maxsplit=1)[0]
    entries = re.findall(r'^    (\w+): (.*(?:\n {8}.*)*)', section, flags=re.MULTILINE)
    return {name: _markdown(' '.join(text.split())) for name, text in entries}


def _markdown(text: str) -> str:
    text = re.sub(r':math:`([^`]*)`', r'$\1$', text)
    return re.sub(r':\w+:`([^`]*)`', r'`\1`', text).replace('``', '`')


def _rows(*headings: str) -> str:
    return _row(*headings) + _row(*('---' for _ in headings))


def _row(*cells: object) -> str:
    return '| ' + ' | '.join(str(cell).replace('|', r'\|') for cell in cells) + ' |\n'


if __name__ == '__main__':
    print(document(), end='')

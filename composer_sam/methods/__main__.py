"""The generator of the pages of the methods from the registry: ``python -m composer_sam.methods docs/methods``.

It writes one page per method, and in ``index.md`` what stands between marks such as ``<!-- generated: table -->`` and
``<!-- end of generated -->``. The measured figures are filled in afterwards by ``python -m benchmarks.readme``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import operator
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from composer_sam import markdown
from composer_sam.files import write_whole
from composer_sam.methods import registry, table
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.cards import card, file_of, hyperparameters

__all__: list[str] = []  # the public names are in the package

_MARKED = re.compile(r'(<!-- generated: (\w+) -->\n).*?(<!-- end of generated -->)', re.DOTALL)


def pages() -> dict[str, str]:
    """Return the page of every method, as Markdown, by the name of its file."""
    return {f'{file_of(registry[row["name"]])}.md': card(row, registry[row['name']]) for row in table()}


def filled(text: str) -> str:
    """Return the page of all methods with what is generated between its marks."""
    parts = {
        'table': _tables(),
        'hyperparameters': hyperparameters(SharpnessAware, list(dataclasses.fields(SharpnessAware))),
    }
    return _MARKED.sub(lambda found: f'{found[1]}{parts[found[2]]}{found[3]}', text)


def _tables() -> str:
    groups = itertools.groupby(table(), operator.itemgetter('group'))
    return '\n'.join(f'### {group}\n\n{_overview(members)}' for group, members in groups)


def _overview(rows: Iterable[dict[str, Any]]) -> str:
    shown = ('passes', 'cost', 'extra_copies', 'held', 'collectives', 'when')
    headings = ('method', 'passes', 'cost', 'memory', 'held', 'collectives', 'take it when')
    links = ((f'[{row["name"]}]({file_of(registry[row["name"]])}.md)', *(row[key] for key in shown)) for row in rows)
    return markdown.table(headings, links)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m composer_sam.methods', description='Write the pages of the methods.'
    )
    parser.add_argument('folder', type=Path, help='the folder of the pages, docs/methods')
    folder: Path = parser.parse_args().folder
    for name, page in pages().items():
        write_whole(folder / name, page)
    index = folder / 'index.md'
    write_whole(index, filled(index.read_text()))


if __name__ == '__main__':
    main()

"""How the tables and pictures of several runs are written: values, names, means over seeds, and Markdown."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from composer_sam import markdown
from composer_sam.extras import extra
from composer_sam.studies.console import console

with extra('composer', __name__):
    from rich.table import Table

__all__ = [
    'Tabulated',
    'as_markdown',
    'bar',
    'grouped',
    'labelled',
    'last_part',
    'literal',
    'mean_text',
    'print_table',
    'seeds_text',
    'value_text',
    'values_text',
]

Tabulated = tuple[str, list[str], list[list[str]]]  # title, headings, rows that begin with their labels
Item = TypeVar('Item')


def last_part(key: str) -> str:
    """Return the name of a key in headings and names."""
    return key.rsplit('.', 1)[-1]


def value_text(value: Any) -> str:
    """Return a value as text for headings and names: 1, 0.05, 1e-05."""
    return f'{value:g}' if isinstance(value, float) and float(f'{value:g}') == value else str(value)


def values_text(values: Mapping[str, Any]) -> str:
    """Return the values of a point of a grid: ``rho 0.1, interval 2``."""
    return ', '.join(f'{last_part(key)} {value_text(value)}' for key, value in values.items())


def labelled(recipe: str, values: Mapping[str, Any]) -> str:
    """Return the name of a recipe at a point of its grid."""
    return ', '.join(filter(None, [recipe, values_text(values)]))


def grouped(items: Iterable[Item], label: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Return the items by their labels, in the order in which these come."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(label(item), []).append(item)
    return found


def mean_text(values: Sequence[float], digits: int, unit: str = '') -> str:
    """Return the mean and the standard deviation."""
    mean = f'{statistics.fmean(values):.{digits}f}'
    return f'{mean} ± {statistics.stdev(values):.{digits}f}{unit}' if len(values) > 1 else f'{mean}{unit}'


def bar(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean, and how far below and above it the lowest and the highest value are."""
    mean = statistics.fmean(values)
    return mean, max(0.0, mean - min(values)), max(0.0, max(values) - mean)


def seeds_text(seeds: Iterable[int]) -> str:
    """Return what the cells of a table are over."""
    ordered = sorted(set(seeds))
    spread = 'mean ± standard deviation over' if len(ordered) > 1 else 'of'
    return f'{spread} seed{"s" * (len(ordered) > 1)} {", ".join(map(str, ordered))}'


def print_table(table: Tabulated) -> None:
    """Print a table below its title."""
    title, headings, rows = table
    stdout = console()
    stdout.print(title)
    printed = Table(box=None, pad_edge=False)
    for heading in headings:
        printed.add_column(heading, justify='right' if heading else 'left', no_wrap=bool(heading), overflow='fold')
    for row in rows:
        printed.add_row(*row)
    stdout.print(printed)
    stdout.print()


def as_markdown(about: str, tables: Iterable[Tabulated]) -> str:
    """Return the tables in Markdown, below a sentence."""
    parts = []
    for title, headings, rows in tables:
        named = [[literal(label), *cells] for label, *cells in rows]
        parts.append(f'## {title}\n\n{markdown.table([literal(heading) for heading in headings], named)}')
    return '\n'.join([f'{about}\n', *parts])


def literal(name: str) -> str:
    """Return a name that Markdown shows as it is: without HTML, emphasis, links and mathematics."""
    return re.sub(r'[\\`*<>&~$\[\]]|(?<!\w)_|_(?!\w)', r'\\\g<0>', name)

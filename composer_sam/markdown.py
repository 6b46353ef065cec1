"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ['table']


def table(headings: Sequence[object], rows: Iterable[Sequence[object]], *, aligned: bool = False) -> str:
    r"""Return a table in Markdown, one line per row, each ended by a newline.

    Args:
        headings: one per column.
        rows: one value per column; ``|`` and line breaks in them are escaped.
        aligned: pad the cells, so that the columns are straight in the text as well.

    Example:
        >>> print(table(('name', 'norm'), [('w', '|w|')]), end='')
        | name | norm |
        | --- | --- |
        | w | \|w\| |
    """
    lines = [[_cell(value) for value in line] for line in (headings, *rows)]
    widths = [max(3, *map(len, column)) if aligned else 3 for column in zip(*lines, strict=True)]
    lines.insert(1, ['-' * width for width in widths])
    padded = [[cell.ljust(width if aligned else 0) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return ''.join(f'| {" | ".join(line)} |\n' for line in padded)


def _cell(value: object) -> str:
    return str(value).replace('|', r'\|').replace('\n', ' ')

"""Tables in Markdown, and docstrings as Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

__all__ = ['of_docstring', 'table']

_MATH = re.compile(r'^( *)\.\. math::(.*(?:\n\1 +\S.*|\n(?=\n))*)\n*', re.MULTILINE)
_ROLE = re.compile(r':\w+:`~?([^`]*)`')


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


def of_docstring(text: str) -> str:
    r"""Return a docstring's text with its reStructuredText marks as Markdown: mathematics, code and references.

    Example:
        >>> print(of_docstring('with :math:`\\rho > 0`, as :class:`~composer_sam.ASAM` has, and ``w``'))
        with $\rho > 0$, as `composer_sam.ASAM` has, and `w`
        >>> print(of_docstring('up by\n\n.. math:: e = g\n\nfrom w'))
        up by
        <BLANKLINE>
        $$
        e = g
        $$
        <BLANKLINE>
        from w
    """
    text = _MATH.sub(_formula, text)
    text = re.sub(r':math:`([^`]*)`', lambda found: f'${" ".join(found[1].split())}$', text)
    return _ROLE.sub(r'`\1`', text).replace('``', '`')


def _formula(found: re.Match[str]) -> str:
    formula = '\n'.join(line.strip() for line in found[2].strip().splitlines())
    if '&' in formula and r'\begin' not in formula:
        formula = f'\\begin{{aligned}}\n{formula}\n\\end{{aligned}}'
    return textwrap.indent(f'$$\n{formula}\n$$\n\n', found[1])

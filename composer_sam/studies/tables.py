"""The tables of a study, one per measure, on the terminal and in files."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from composer_sam import markdown
from composer_sam.extras import extra
from composer_sam.studies.console import console
from composer_sam.studies.result import RunResult, TrainedSharpness

with extra('composer', __name__):
    from rich.table import Table

__all__ = [
    'ACCURACY',
    'Cells',
    'Measure',
    'about',
    'as_markdown',
    'last_part',
    'literal',
    'measures_of',
    'print_table',
    'print_tables',
    'tables',
    'value_text',
]

_NONE = '-'  # the heading of the column of runs without a value


def last_part(key: str) -> str:
    """Return the name of a key in headings and names."""
    return key.rsplit('.', 1)[-1]


def value_text(value: Any) -> str:
    """Return a value as text for headings and names: 1, 0.05, 1e-05."""
    return f'{value:g}' if isinstance(value, float) and float(f'{value:g}') == value else str(value)


class Cells:
    """The runs of a study arranged in a table, those that differ in their seed only in one cell.

    The columns are the values of the key that most recipes have in their grids. The rows are the recipes, with the
    values of their other keys.

    Attributes:
        column: the name of the key of the columns; empty if no recipe has a grid.
        numbers: whether the columns are numbers.
        rows: the labels of the rows, in the order of the runs.
        columns: the values of the columns in ascending order, first None if there are runs without a value.
        cells: the runs by row and column.
    """

    def __init__(self, runs: Sequence[RunResult]) -> None:
        counts: dict[str, set[str]] = {}
        for run in runs:
            for key in run.values:
                counts.setdefault(last_part(key), set()).add(run.recipe)
        self.column = max(counts, key=lambda part: len(counts[part]), default='')
        self.cells: dict[tuple[str, Any], list[RunResult]] = {}
        for run in runs:
            self.cells.setdefault(self._place(run), []).append(run)
        self.rows = list(dict.fromkeys(row for row, _ in self.cells))
        columns = {column for _, column in self.cells}
        numbers = all(isinstance(column, (int, float)) for column in columns if column is not None)
        ordered = sorted((c for c in columns if c is not None), key=float if numbers else str)
        self.numbers = numbers and bool(ordered)
        self.columns = [None] * (None in columns) + ordered

    def heading(self, column: Any) -> str:
        """Return the heading of a column."""
        return _NONE if column is None else f'{self.column} {value_text(column)}'

    def at(self, row: str, column: Any) -> list[RunResult]:
        """Return the runs of a cell, which can be empty."""
        return self.cells.get((row, column), [])

    def _place(self, run: RunResult) -> tuple[str, Any]:
        """Return the row and the column of a run."""
        ours = [key for key in run.values if last_part(key) == self.column]
        value = run.values[ours[0]] if len(ours) == 1 else None
        others = [key for key in run.values if len(ours) != 1 or key != ours[0]]
        label = ', '.join([run.recipe, *(f'{last_part(key)} {value_text(run.values[key])}' for key in others)])
        return label, value if isinstance(value, (str, int, float, bool, type(None))) else json.dumps(value)


@dataclass(frozen=True)
class Measure:
    """A number that every run has, and how it is shown.

    Attributes:
        title: the heading of its table.
        read: returns the number of a run, None if the run has none.
        percent: whether it is a part, and shown in percent.
        drawn: whether it is in the picture too.
        of_directions: whether only runs of methods with a direction of their own have it.
    """

    title: str
    read: Callable[[RunResult], float | None]
    percent: bool = False
    drawn: bool = False
    of_directions: bool = False

    def values(self, runs: Sequence[RunResult]) -> list[float] | None:
        """Return the number of every run, None if a run has none, as the mean of the others would mislead."""
        found = [value for run in runs if (value := self.read(run)) is not None]
        if not found or len(found) < len(runs):
            return None
        return [100 * value if self.percent else value for value in found]

    def text(self, runs: Sequence[RunResult]) -> str:
        """Return the mean and the standard deviation over the runs."""
        if not runs:
            return ''
        values = self.values(runs)
        if values is None:
            return 'failed'
        mean = statistics.fmean(values)
        digits = 2 if abs(mean) >= 10 or self.percent else 3 if abs(mean) >= 0.1 else 5
        spread = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
        return f'{mean:.{digits}f}{spread}'


ACCURACY = Measure('Test accuracy (%)', lambda run: run.accuracy, percent=True, drawn=True)


def measures_of(runs: Sequence[RunResult]) -> list[Measure]:
    """Return the measures that the runs have."""
    found = [ACCURACY]
    options = runs[0].config['sharpness']
    if options is not None:
        found += [
            Measure('Largest Hessian eigenvalue', _sharpness(lambda found: found.top_eigenvalue), drawn=True),
            Measure('Trace of the Hessian', _sharpness(lambda found: found.trace)),
            Measure(f'SAM sharpness within {options["rho"]:g}', _sharpness(lambda found: found.sam_sharpness)),
        ]
    found += [
        Measure('Test loss', lambda run: run.test_loss),
        Measure('Training loss, last epoch', lambda run: run.train_loss),
    ]
    if any(run.geometry for run in runs):
        title = "Entries larger than the gradient's (%), mean over steps"
        found.append(Measure(title, _share_larger, percent=True, of_directions=True))
    return found


def _sharpness(read: Callable[[TrainedSharpness], float | None]) -> Callable[[RunResult], float | None]:
    return lambda run: None if run.sharpness is None else read(run.sharpness)


def _share_larger(run: RunResult) -> float | None:
    return statistics.fmean(run.geometry['share_larger']) if run.geometry else None


def tables(runs: Sequence[RunResult]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return the title, headings and rows of every measure; cells are mean and standard deviation over the seeds."""
    cells = Cells(runs)
    found = []
    for measure in measures_of(runs):
        rows = []
        for row in cells.rows:
            in_row = [cells.at(row, column) for column in cells.columns]
            if measure.of_directions and not any(run.geometry for cell in in_row for run in cell):
                continue  # a plain optimizer has no direction of its own
            rows.append([row, *(measure.text(cell) for cell in in_row)])
        found.append((measure.title, ['', *(cells.heading(column) for column in cells.columns)], rows))
    return found


def print_tables(runs: Sequence[RunResult]) -> None:
    """Print the tables."""
    for title, headings, rows in tables(runs):
        print_table(title, headings, rows)


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table below its title."""
    stdout = console()
    stdout.print(title)
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify='right' if heading else 'left', no_wrap=bool(heading), overflow='fold')
    for row in rows:
        table.add_row(*row)
    stdout.print(table)
    stdout.print()


def as_markdown(runs: Sequence[RunResult]) -> str:
    """Return the tables in Markdown, below a sentence about the runs."""
    parts = []
    for title, headings, rows in tables(runs):
        named = [[literal(row), *cells] for row, *cells in rows]
        parts.append(f'## {title}\n\n{markdown.table([literal(heading) for heading in headings], named)}')
    return '\n'.join([f'{about(runs)}\n', *parts])


def literal(name: str) -> str:
    """Return a name that Markdown shows as it is: without HTML, emphasis, links and mathematics."""
    return re.sub(r'[\\`*<>&~$\[\]]|(?<!\w)_|_(?!\w)', r'\\\g<0>', name)


def about(runs: Sequence[RunResult]) -> str:
    """Return a sentence about the runs, their seeds and the samples their sharpness is measured on."""
    seeds = sorted({run.seed for run in runs})
    measured = {run.sharpness.samples for run in runs if run.sharpness and run.sharpness.samples is not None}
    how = f'; sharpness on {max(measured)} training samples without augmentation' if measured else ''
    spread = 'mean ± standard deviation over' if len(seeds) > 1 else 'of'
    return f'{len(runs)} runs, {spread} seed{"s" * (len(seeds) > 1)} {", ".join(map(str, seeds))}{how}.'

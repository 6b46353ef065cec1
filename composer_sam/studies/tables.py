"""The tables of a study, one per measure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from composer_sam.studies.result import RunResult, TrainedSharpness
from composer_sam.studies.texts import Tabulated, labelled, last_part, mean_text, seeds_text, value_text

__all__ = [
    'ACCURACY',
    'Cells',
    'Measure',
    'about',
    'measures_of',
    'tables',
]

_NONE = '-'  # the heading of the column of runs without a value


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
        others = {key: value for key, value in run.values.items() if len(ours) != 1 or key != ours[0]}
        label = labelled(run.recipe, others)
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
        return mean_text(values, 2 if abs(mean) >= 10 or self.percent else 3 if abs(mean) >= 0.1 else 5)


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


def tables(runs: Sequence[RunResult]) -> list[Tabulated]:
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


def about(runs: Sequence[RunResult]) -> str:
    """Return a sentence about the runs, their seeds and the samples their sharpness is measured on."""
    measured = {run.sharpness.samples for run in runs if run.sharpness and run.sharpness.samples is not None}
    how = f'; sharpness on {max(measured)} training samples without augmentation' if measured else ''
    return f'{len(runs)} runs, {seeds_text(run.seed for run in runs)}{how}.'

"""What a study prints and writes: a table per measure, the numbers, and a picture."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from composer_sam.studies.parallel import write

__all__ = ['draw', 'last_part', 'print_tables', 'tables', 'value_text', 'write_report']

Run = dict[str, Any]

_WIDTH = 200
_NONE = '-'  # the column of runs that do not have what the columns are about


def last_part(key: str) -> str:
    """What a key is called in headings and names."""
    return key.rsplit('.', 1)[-1]


def value_text(value: Any) -> str:
    """A value in headings and names: 1, 0.05, 1e-05."""
    return f'{value:g}' if isinstance(value, float) and float(f'{value:g}') == value else str(value)


class Layout:
    """Which runs share a cell: rows are recipes and the rest of their grid, columns what most grids are over.

    Attributes:
        column: What the columns are values of; empty if no recipe has a grid.
        rows: Labels, in the order of the runs.
        columns: Values in their order, None for runs without one, which come first.
        cells: Runs by row and column.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        counts: dict[str, set[str]] = {}
        for run in runs:
            for key in run['values']:
                counts.setdefault(last_part(key), set()).add(run['recipe'])
        self.column = max(counts, key=lambda part: len(counts[part]), default='')
        self.cells: dict[tuple[str, Any], list[Run]] = {}
        for run in runs:
            ours = [key for key in run['values'] if last_part(key) == self.column]
            value = run['values'][ours[0]] if len(ours) == 1 else None
            others = [key for key in run['values'] if len(ours) != 1 or key != ours[0]]
            label = ', '.join([run['recipe'], *(f'{last_part(k)} {value_text(run["values"][k])}' for k in others)])
            self.cells.setdefault((label, _hashable(value)), []).append(run)
        self.rows = list(dict.fromkeys(row for row, _ in self.cells))
        columns = {column for _, column in self.cells}
        numbers = all(isinstance(column, (int, float)) for column in columns if column is not None)
        ordered = sorted((c for c in columns if c is not None), key=float if numbers else str)
        self.numbers = numbers and bool(ordered)
        self.columns = [None] * (None in columns) + ordered

    def heading(self, column: Any) -> str:
        return _NONE if column is None else f'{self.column} {value_text(column)}'


class _Measure:
    """One table: what is in it and how it is written."""

    def __init__(self, title: str, read: Callable[[Run], Any], unit: str = '', scale: float = 1.0) -> None:
        self.title = title
        self.read = read
        self.unit = unit
        self.scale = scale

    def values(self, runs: Sequence[Run]) -> list[float] | None:
        """Of every seed; None if one of them has none, as the mean of the others would mislead."""
        found = [self.read(run) for run in runs]
        return None if None in found or not found else [self.scale * value for value in found]

    def text(self, runs: Sequence[Run]) -> str:
        if not runs:
            return ''
        values = self.values(runs)
        if values is None:
            return 'failed'
        mean = statistics.fmean(values)
        digits = 2 if abs(mean) >= 10 or self.unit else 3 if abs(mean) >= 0.1 else 5
        spread = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
        return f'{mean:.{digits}f}{spread}'


def _measures(runs: Sequence[Run]) -> list[_Measure]:
    def sharpness(name: str) -> Callable[[Run], Any]:
        return lambda run: run['sharpness'].get(name)

    def geometry(name: str) -> Callable[[Run], Any]:
        return lambda run: statistics.fmean(run['geometry'][name]) if run['geometry'] else None

    found = [_Measure('Test accuracy (%)', lambda run: run['accuracy'], '%', 100)]
    config = runs[0]['config']['sharpness']
    if config is not None:
        found += [
            _Measure('Largest Hessian eigenvalue', sharpness('top_eigenvalue')),
            _Measure('Trace of the Hessian', sharpness('trace')),
            _Measure(f'SAM sharpness within {config["rho"]:g}', sharpness('sam_sharpness')),
        ]
    found += [
        _Measure('Test loss', lambda run: run['test_loss']),
        _Measure('Training loss, last epoch', lambda run: run['train_loss']),
    ]
    if any(run['geometry'] for run in runs):
        found.append(
            _Measure("Entries larger than the gradient's (%), mean over steps", geometry('share_larger'), '%', 100)
        )
    return found


def tables(runs: Sequence[Run]) -> list[tuple[str, list[str], list[list[str]]]]:
    """A title, headings and rows for every measure; cells are mean and standard deviation over the seeds."""
    layout = Layout(runs)
    found = []
    for measure in _measures(runs):
        rows = []
        for row in layout.rows:
            cells = [layout.cells.get((row, column), []) for column in layout.columns]
            if 'larger' in measure.title and not any(run['geometry'] for cell in cells for run in cell):
                continue  # plain SGD has no direction of its own
            rows.append([row, *(measure.text(cell) for cell in cells)])
        found.append((measure.title, ['', *(layout.heading(column) for column in layout.columns)], rows))
    return found


def print_tables(runs: Sequence[Run]) -> None:
    """Prints the tables; in a file they are not cut at the width of a terminal there is none of."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _WIDTH)
    for title, headings, rows in tables(runs):
        console.print(title)
        table = Table(box=None, pad_edge=False)
        for heading in headings:
            table.add_column(heading, justify='right' if heading else 'left', no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()


def write_report(runs: Sequence[Run], out: Path) -> list[Path]:
    """Writes ``tables.md``, ``results.json`` and ``study.png`` and returns the files."""
    lines = [f'{_about(runs)}\n']
    for title, headings, rows in tables(runs):
        lines += [f'## {title}\n', _markdown_row(headings), f'|{"---|" * len(headings)}']
        lines += [*map(_markdown_row, rows), '']
    write(out / 'tables.md', '\n'.join(lines).encode())
    write(out / 'results.json', json.dumps({'about': _about(runs), 'runs': list(runs)}, indent=1).encode())
    partial = out / '.study.partial.png'
    draw(runs).savefig(partial, dpi=150)
    partial.replace(out / 'study.png')
    return [out / name for name in ('tables.md', 'results.json', 'study.png')]


def _about(runs: Sequence[Run]) -> str:
    seeds = sorted({run['seed'] for run in runs})
    measured = {run['sharpness']['samples'] for run in runs if run['sharpness'] and 'samples' in run['sharpness']}
    how = f'; sharpness on {max(measured)} training samples without augmentation' if measured else ''
    spread = 'mean ± standard deviation over' if len(seeds) > 1 else 'of'
    return f'{len(runs)} runs, {spread} seed{"s" * (len(seeds) > 1)} {", ".join(map(str, seeds))}{how}.'


def _markdown_row(cells: Sequence[str]) -> str:
    return f'| {" | ".join(cells)} |'


def draw(runs: Sequence[Run]) -> Figure:
    """Accuracy and largest eigenvalue at the columns' values, and how the directions differ from the gradients."""
    layout = Layout(runs)
    measures = [measure for measure in _measures(runs) if measure.title.startswith(('Test accuracy', 'Largest'))]
    has_geometry = any(run['geometry'] for run in runs)
    panels = len(measures) + has_geometry
    figure = Figure(figsize=(4.6 * panels + 0.6, 4.8), layout='constrained')
    axes: Any = figure.subplots(1, panels, squeeze=False)[0]
    draw = _draw_rows if layout.columns == [None] else _draw_measure
    for measure, panel in zip(measures, axes, strict=False):
        draw(panel, layout, measure)
    if has_geometry:
        _draw_geometry(axes[-1], layout, measures[0])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=min(len(labels), 4), frameon=False)
    return figure


def _draw_rows(axes: Axes, layout: Layout, measure: _Measure) -> None:
    """Without a grid: a point for every row, with the spread of the seeds."""
    for index, row in enumerate(layout.rows):
        values = measure.values(layout.cells.get((row, None), []))
        if values is not None:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            style: dict[str, Any] = {'label': row, 'color': f'C{index % 10}'}
            axes.errorbar(statistics.fmean(values), index, xerr=spread, marker='o', linestyle='', capsize=3, **style)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set(title=measure.title)
    axes.grid(alpha=0.3)


def _draw_measure(axes: Axes, layout: Layout, measure: _Measure) -> None:
    columns = [column for column in layout.columns if column is not None]
    places = [float(column) for column in columns] if layout.numbers else list(range(len(columns)))
    drawn = []
    for index, row in enumerate(layout.rows):
        style: dict[str, Any] = {'label': row, 'color': f'C{index % 10}'}
        points = []
        for place, column in zip(places, columns, strict=True):
            values = measure.values(layout.cells.get((row, column), []))
            if values is not None:
                points.append((place, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
        alone = measure.values(layout.cells.get((row, None), []))
        if alone is not None:
            mean, spread = statistics.fmean(alone), statistics.stdev(alone) if len(alone) > 1 else 0.0
            axes.axhline(mean, linestyle='--', linewidth=1.2, **style)
            axes.axhspan(mean - spread, mean + spread, alpha=0.12, linewidth=0, color=style['color'])
            drawn.append(mean)
        if points:
            x, y, error = zip(*points, strict=True)
            axes.errorbar(x, y, error, marker='o', markersize=4, linewidth=1.3, alpha=0.9, capsize=2, **style)
            drawn += y
    if layout.numbers and places[0] > 0 and places[-1] >= 4 * places[0]:
        axes.set_xscale('log')
    axes.set_xticks(places, [value_text(column) for column in columns])
    axes.minorticks_off()
    if not measure.unit and drawn and min(drawn) > 0 and max(drawn) > 10 * min(drawn):
        axes.set_yscale('log')
    axes.set(xlabel=layout.column, title=measure.title)
    axes.grid(alpha=0.3)


def _draw_geometry(axes: Axes, layout: Layout, accuracy: _Measure) -> None:
    """Over the epochs, at each row's most accurate value: the mean over the seeds in a band from lowest to highest."""
    for index, row in enumerate(layout.rows):
        cells = [
            (statistics.fmean(values), runs)
            for column in layout.columns
            if (runs := layout.cells.get((row, column))) and (values := accuracy.values(runs)) is not None
        ]
        if not cells:
            continue
        _, runs = max(cells, key=lambda cell: cell[0])
        curves = [run['geometry'] for run in runs if run['geometry']]
        if not curves:
            continue
        columns = list(zip(*(curve['share_larger'] for curve in curves), strict=False))
        epochs = curves[0]['epoch'][: len(columns)]
        axes.plot(epochs, [100 * statistics.fmean(column) for column in columns], color=f'C{index % 10}', linewidth=1.2)
        lowest, highest = ([100 * pick(column) for column in columns] for pick in (min, max))
        axes.fill_between(epochs, lowest, highest, alpha=0.15, color=f'C{index % 10}', linewidth=0)
    where = f'\nat the most accurate {layout.column} of each' if layout.column else ''
    axes.set(xlabel='epoch', title=f"Entries larger than the gradient's (%){where}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else json.dumps(value)

"""The picture of a study."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from composer_sam.extras import extra
from composer_sam.landscapes.pictures import caption_inches, look, plain
from composer_sam.studies.problem import described
from composer_sam.studies.result import RunResult
from composer_sam.studies.tables import ACCURACY, Cells, Measure, measures_of
from composer_sam.studies.texts import bar, value_text

with extra('diagnostics', __name__):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

__all__ = ['draw']

_LEGEND_INCHES, _ROW_INCHES, _TICK_INCHES = 4, 2, 2


def draw(runs: Sequence[RunResult]) -> Figure:
    """Draw accuracy and largest eigenvalue against the columns' values, and the share of larger entries by epoch.

    Points are means over the seeds. Bars and bands reach from the lowest to the highest seed, so that none leaves the
    range of its measure.
    """
    cells = Cells(runs)
    measures = [measure for measure in measures_of(runs) if measure.drawn]
    has_geometry = any(run.geometry for run in runs)
    panels = len(measures) + has_geometry
    seeds = len({run.seed for run in runs})
    shown = f'mean over {seeds} seeds; bars and bands: lowest to highest seed' if seeds > 1 else 'one seed'
    data = described([(run.config['data']['name'], run.config['data']['label_noise']) for run in runs])
    width = 4.6 * panels + 0.6
    title = plain('\n'.join(filter(None, [_finding(cells, measures), data, shown])), width)
    figure = Figure(figsize=(width, 4.1 + caption_inches(title)), layout='constrained')
    axes: Any = figure.subplots(1, panels, squeeze=False)[0]
    by_row = cells.columns == [None]
    draw_measure = _draw_rows if by_row else _draw_columns
    for measure, panel in zip(measures, axes, strict=False):
        draw_measure(panel, cells, measure)
    if has_geometry:
        _draw_geometry(axes[-1], cells)
    figure.suptitle(title, fontsize=11)
    if by_row:
        _name_rows(axes[0], cells)
    else:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=min(len(labels), 4), frameon=False)
    return figure


def _finding(cells: Cells, measures: Sequence[Measure]) -> str:
    """Return which runs are the most accurate, and all that is drawn of them."""
    accuracies = {
        (row, column): statistics.fmean(values)
        for row in cells.rows
        for column in cells.columns
        if (values := ACCURACY.values(cells.at(row, column))) is not None
    }
    if len(accuracies) < 2:
        return ''
    row, column = max(accuracies, key=lambda place: accuracies[place])
    at = '' if column is None else f' at {cells.heading(column)}'
    numbers = [f'{measure.title}: {measure.text(cells.at(row, column))}' for measure in measures]
    return f'Most accurate is {row}{at}. {"; ".join(numbers)}'


def _draw_rows(axes: Axes, cells: Cells, measure: Measure) -> None:
    """Draw a point for every row, with the spread over the seeds; for recipes without a grid."""
    for index, row in enumerate(cells.rows):
        values = measure.values(cells.at(row, None))
        if values is not None:
            mean, below, above = bar(values)
            style: dict[str, Any] = look(index) | {'linestyle': ''}
            axes.errorbar(mean, index, xerr=[[below], [above]], capsize=3, **style)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set(title=measure.title)
    axes.grid(alpha=0.3)


def _name_rows(axes: Axes, cells: Cells) -> None:
    """Write the name of every row beside it, in its colour."""
    axes.set_yticks(range(len(cells.rows)), [plain(row, _ROW_INCHES) for row in cells.rows])
    for index, name in enumerate(axes.get_yticklabels()):
        name.set_color(look(index)['color'])


def _draw_columns(axes: Axes, cells: Cells, measure: Measure) -> None:
    """Draw a curve for every row, with the spread over the seeds, and a band for runs without a value."""
    columns = [column for column in cells.columns if column is not None]
    places = [float(column) for column in columns] if cells.numbers else list(range(len(columns)))
    drawn = []
    for index, row in enumerate(cells.rows):
        style: dict[str, Any] = look(index) | {'label': plain(row, _LEGEND_INCHES)}
        points = []
        for place, column in zip(places, columns, strict=True):
            values = measure.values(cells.at(row, column))
            if values is not None:
                points.append((place, *bar(values)))
        alone = measure.values(cells.at(row, None))
        if alone is not None:
            line: dict[str, Any] = style | {'linestyle': '--', 'marker': ''}
            axes.axhline(statistics.fmean(alone), linewidth=1.2, **line)
            axes.axhspan(min(alone), max(alone), alpha=0.12, linewidth=0, color=style['color'])
            drawn.append(min(alone))
        if points:
            x, y, below, above = zip(*points, strict=True)
            axes.errorbar(x, y, [below, above], markersize=4, linewidth=1.3, alpha=0.9, capsize=2, **style)
            drawn += [mean - down for mean, down in zip(y, below, strict=True)]
            drawn += y
    if cells.numbers and places[0] > 0 and places[-1] >= 4 * places[0]:
        axes.set_xscale('log')
    axes.set_xticks(places, [plain(value_text(column), _TICK_INCHES) for column in columns])
    axes.minorticks_off()
    if not measure.percent and drawn and min(drawn) > 0 and max(drawn) > 10 * min(drawn):
        axes.set_yscale('log')
    axes.set(xlabel=plain(cells.column, 4), title=measure.title)
    axes.grid(alpha=0.3)


def _draw_geometry(axes: Axes, cells: Cells) -> None:
    """Draw the share of larger entries by epoch for every row, at the value of its highest accuracy.

    The curve is the mean over the seeds, in a band from the lowest to the highest.
    """
    for index, row in enumerate(cells.rows):
        tested = [
            (statistics.fmean(values), runs)
            for column in cells.columns
            if (runs := cells.at(row, column)) and (values := ACCURACY.values(runs)) is not None
        ]
        if not tested:
            continue
        _, runs = max(tested, key=lambda cell: cell[0])
        curves = [run.geometry for run in runs if run.geometry]
        if not curves:
            continue
        columns = list(zip(*(curve['share_larger'] for curve in curves), strict=False))
        epochs = curves[0]['epoch'][: len(columns)]
        style: dict[str, Any] = look(index) | {'marker': '', 'linewidth': 1.2}
        axes.plot(epochs, [100 * statistics.fmean(column) for column in columns], **style)
        lowest, highest = ([100 * pick(column) for column in columns] for pick in (min, max))
        axes.fill_between(epochs, lowest, highest, alpha=0.15, color=style['color'], linewidth=0)
    where = f'\nat the most accurate {cells.column} of each' if cells.column else ''
    axes.set(xlabel='epoch', title=plain(f"Entries larger than the gradient's (%){where}", 4.6))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)

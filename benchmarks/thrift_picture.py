"""Draw the share of SAM's gain that is kept against the passes per step, from the report of the cheap settings.

python -m benchmarks.thrift_picture
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from benchmarks.pareto import front
from benchmarks.picture import write_picture
from benchmarks.thrift_tables import GOAL_PASSES, GOAL_SHARE, NONE, SHARES, SHARES_COLUMNS, goal

__all__ = ['PICTURE', 'draw', 'title']

PICTURE = Path(__file__).resolve().parents[1] / 'docs' / 'thrift.png'
_LEFT = 0.78  # of the axis; settings of one pass are named there
_LOWEST = -20.0  # percent; what is lower is drawn here, as an arrow
# Colours that are told apart with any kind of colour blindness (Okabe and Ito).
_COLOURS = {
    'SAM': 'black', 'interval': '#0072B2', 'start': '#009E73', 'end': '#CC79A7', 'ascent_fraction': '#D55E00',
    'MSAM': '#E69F00', 'LookSAM': '#56B4E9', 'AESAM': '#8C6D31', 'RandomSAM': '#666666', 'both': '#7B3294',
}  # fmt: skip
_PLACES = [(x, y) for y in (0, 9, -9, 18, -18, 27, -27, 36, -36, 48, -48) for x in (7, -7)]  # of labels, in points

Row = dict[str, Any]


def title(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Return what the picture shows, in one line."""
    tried = [row for row in rows if row['variant'] != 'SAM' and goal(row['passes'], GOAL_SHARE)]
    most = max(tried, key=lambda row: row['smallest share'])
    said = (
        f"{most['variant']} keeps {most['smallest share']:.0f} % of SAM's gain at {most['passes']:.3g} passes per step"
    )
    where = f'on the worst of {len(tasks)} tasks' if len(tasks) > 1 else f'on {tasks[0]}'
    short = '' if goal(most['passes'], most['smallest share']) else '; no setting reaches it'
    return f'{said}, {where}\n(the goal: {GOAL_SHARE:.0f} % at {GOAL_PASSES} passes or less{short})'


def draw(report: dict[str, Any]) -> Figure:
    """Draw the smallest share over the tasks of every setting that was trained on all of them."""
    table = next(t for t in report['tables'] if t['title'] == SHARES)
    rows = [dict(zip(table['columns'], row, strict=True)) for row in table['rows']]
    tasks = [column for column in table['columns'] if column not in SHARES_COLUMNS]
    if not tasks:
        raise SystemExit('SAM has a gain on none of the tasks: there is nothing to draw')
    rows = [row for row in rows if all(row[task] != NONE for task in tasks)]
    figure = Figure(figsize=(10.5, 7.4), layout='constrained')
    axis = figure.subplots()
    axis.set_title(title(rows, tasks), fontsize=11)
    axis.set_xlabel('passes per step; SGD has 1')
    which = f'the smallest of {len(tasks)} tasks' if len(tasks) > 1 else tasks[0]
    axis.set_ylabel(f"share of SAM's gain that is kept, {which}")
    axis.xaxis.set_major_formatter(lambda value, _: f'{value:g}x')
    axis.yaxis.set_major_formatter(lambda value, _: f'{value:.0f} %')
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_xlim(_LEFT, 2.12)
    axis.set_ylim(_LOWEST - 6, max(108.0, *(row['smallest share'] + 8 for row in rows)))
    axis.fill_between([_LEFT, GOAL_PASSES], GOAL_SHARE, axis.get_ylim()[1], color='0.92', zorder=0)
    axis.text(_LEFT, axis.get_ylim()[1], ' the goal', va='top', fontsize=9, color='0.35')
    reached = front([(row['passes'], row['smallest share']) for row in rows if row['smallest share'] > _LOWEST])
    axis.step(*zip(*reached, strict=True), where='post', color='0.85', linewidth=5, zorder=1)
    for family, colour in _COLOURS.items():
        _points(axis, [row for row in rows if row['family'] == family], colour, family)
    _label(axis, rows)
    return figure


def _points(axis: Axes, rows: Sequence[Row], colour: str, family: str) -> None:
    rows = sorted(rows, key=lambda row: row['passes'])
    shares = [max(_LOWEST, row['smallest share']) for row in rows]
    passes = [row['passes'] for row in rows]
    if family != 'both':
        axis.plot(passes, shares, color=colour, linewidth=1, zorder=2)
    for x, y, row in zip(passes, shares, rows, strict=True):
        below = row['smallest share'] < _LOWEST
        axis.plot(x, y, marker='v' if below else 'D' if family == 'both' else 'o', color=colour, markersize=6, zorder=3)


def _label(axis: Axes, rows: Sequence[Row]) -> None:
    """Write the name of every setting beside its point, each where it covers no point and no other name."""
    figure: Any = axis.figure
    figure.draw_without_rendering()
    positions = [(row['passes'], max(_LOWEST, row['smallest share'])) for row in rows]
    pixels = [axis.transData.transform(position) for position in positions]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in pixels]
    inside = axis.get_window_extent()
    for row, position in zip(rows, positions, strict=True):
        for offset in _PLACES:
            far = abs(offset[1]) > 9
            written = axis.annotate(
                row['variant'],
                position,
                offset,
                textcoords='offset points',
                ha='left' if offset[0] > 0 else 'right',
                va='center',
                fontsize=7.5,
                color=_COLOURS[row['family']],
                path_effects=[withStroke(linewidth=2.5, foreground='white')],
                arrowprops={'arrowstyle': '-', 'color': '0.7', 'linewidth': 0.6, 'shrinkB': 3} if far else None,
            )
            written.get_window_extent()  # which places it
            box = Text.get_window_extent(written)  # without its line
            free = not any(box.overlaps(other) for other in taken) and inside.x0 <= box.x0 and box.x1 <= inside.x1
            if free or offset == _PLACES[-1]:
                taken.append(box)
                break
            written.remove()


if __name__ == '__main__':
    write_picture(__doc__, 'thrift', draw, PICTURE)

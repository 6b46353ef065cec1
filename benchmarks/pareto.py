"""Draw accuracy against relative cost, from the report of the quality benchmark.

python -m benchmarks.pareto
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.picture import write_picture
from composer_sam.landscapes.pictures import COLORS

__all__ = ['PICTURE', 'draw', 'front', 'title']

PICTURE = Path(__file__).resolve().parents[1] / 'docs' / 'pareto.png'
_METHODS = ('SAM', 'ASAM', 'WSAM', 'GAM', 'SAMDirection', 'SAMMagnitude')
_COLOURS = {'SGD': 'black', **dict(zip(_METHODS, COLORS, strict=True)), 'SGDHess': '0.5'}
# Open markers of different shapes, and SAM's small and filled on top: where several methods are equal, all are seen.
_MARKERS = {'SAM': 'o', 'ASAM': '^', 'WSAM': 's', 'GAM': 'D', 'SAMDirection': 'v', 'SAMMagnitude': 'P', 'SGDHess': 'X'}
_KNOBS = {'fixed': 'interval 2, 5, 10, the same rho', 'scaled': 'interval 2, 5, 10, a larger rho'}


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (cost, accuracy) more accurate than all points of no higher cost, in ascending order."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return best


def title(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> str:
    """Return what the picture shows of SAM, in one line."""
    sam = {row['task']: row for row in rows if row['method'] == 'SAM' and not row['knob']}
    gains = [task for task in tasks if sam[task]['gain at equal compute'] > sam[task]['± 95% there']]
    return (
        f'SAM is more accurate than SGD that trains for as long on {len(gains)} of {len(tasks)} tasks, beyond the 95% '
        'interval'
    )


def draw(report: dict[str, Any]) -> Figure:
    """Draw one panel per task."""
    table = next(t for t in report['tables'] if t['title'] == 'Accuracy at equal epochs and at equal compute')
    rows = [dict(zip(table['columns'], row, strict=True)) for row in table['rows']]
    tasks = list(dict.fromkeys(row['task'] for row in rows))
    across = min(3, len(tasks))
    down = -(-len(tasks) // across)
    figure = Figure(figsize=(4.4 * across, 3.8 * down + 0.6), layout='constrained')
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis, task in zip(axes, tasks, strict=False):
        _panel(axis, task, [row for row in rows if row['task'] == task])
    for axis in axes[len(tasks) :]:
        axis.remove()
    figure.suptitle(f'{title(rows, tasks)}\nmean and standard deviation over {rows[0]["seeds"]} seeds', fontsize=11)
    drawn = [axis.get_legend_handles_labels() for axis in figure.axes]
    entries = {label: handle for handles, labels in drawn for handle, label in zip(handles, labels, strict=True)}
    figure.legend(list(entries.values()), list(entries), loc='outside lower center', ncols=4, fontsize=8, frameon=False)
    return figure


def _panel(axis: Axes, task: str, rows: Sequence[dict[str, Any]]) -> None:
    axis.set_title(task, fontsize=9)
    axis.set_xscale('log', base=2)
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_xlabel('time of training / that of SGD')
    axis.set_ylabel('test accuracy (%)')
    axis.xaxis.set_major_formatter(lambda value, _: f'{value:g}x')
    points = [(row['cost'], row['accuracy']) for row in rows]
    reached = [*front(points), (max(cost for cost, _ in points), max(accuracy for _, accuracy in points))]
    axis.step(
        *zip(*reached, strict=True), where='post', color='0.8', linewidth=6, zorder=0, label='the best at its cost'
    )
    lines = {'SGD': [r for r in rows if r['method'] == 'SGD']}
    sam = [r for r in rows if r['method'] == 'SAM' and not r['knob']]
    for knob in _KNOBS:
        if turned := [r for r in rows if r['knob'] == knob]:
            lines[knob] = [*sam, *turned]
    for name, own in lines.items():
        own = sorted(own, key=lambda row: row['cost'])
        style = {'SGD': '-', 'fixed': '--', 'scaled': ':'}[name]
        colour = _COLOURS['SGD' if name == 'SGD' else 'SAM']
        label = 'SGD for 1, 2, 4 times the epochs, not stopped early' if name == 'SGD' else f'SAM, {_KNOBS[name]}'
        costs, accuracies = [row['cost'] for row in own], [row['accuracy'] for row in own]
        axis.plot(costs, accuracies, style, color=colour, linewidth=1, label=label)
    for row in rows:
        method = row['method']
        plain, sam_itself = method == 'SGD' or row['knob'], method == 'SAM' and not row['knob']
        axis.errorbar(
            row['cost'],
            row['accuracy'],
            row['±'],
            fmt='.' if plain else _MARKERS[method],
            color=_COLOURS[method],
            markerfacecolor=_COLOURS[method] if plain or sam_itself else 'none',
            markersize=None if plain else 5 if sam_itself else 10,
            capsize=2,
            linewidth=1,
            zorder=4 if sam_itself else 3,
            label=None if plain else method,
        )


if __name__ == '__main__':
    write_picture(__doc__, 'quality', draw, PICTURE)

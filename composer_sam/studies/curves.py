"""The picture of a comparison: test accuracy and training loss by epoch, each curve with its name at its end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from composer_sam.extras import extra
from composer_sam.landscapes.pictures import look, plain

with extra('diagnostics', __name__):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ['Curve', 'draw']

_LEGEND_INCHES = 5
_NAMES, _LETTERS = 6, 30  # more names, or longer ones, have no place at the ends of curves
_NAME_INCHES = 1.5
_GAP = 0.06  # the height of a line of a name, in parts of the height of the picture


class Curve(Protocol):
    """What the picture shows of a run."""

    @property
    def accuracy(self) -> float:
        """Test accuracy, in [0, 1]."""
        ...

    @property
    def stop_epoch(self) -> float | None:
        """The epoch that ``early_stopping`` has chosen."""
        ...

    @property
    def train(self) -> Mapping[str, Sequence[float]]:
        """Training loss by ``epoch``."""
        ...

    @property
    def test(self) -> Mapping[str, Sequence[float]]:
        """Test accuracy by ``epoch``."""
        ...


def draw(grouped: Mapping[str, Sequence[Curve]], about: str = '') -> Figure:
    """Draw test accuracy and training loss by epoch: the mean over the seeds, in a band from lowest to highest.

    Args:
        grouped: the runs of every recipe, by its name.
        about: what they were trained on, for the title.
    """
    figure = Figure(figsize=(11, 4.8), layout='constrained')
    accuracy, loss = figure.subplots(1, 2)
    at_ends = len(grouped) <= _NAMES and all(len(name) <= _LETTERS and name.isascii() for name in grouped)
    ends: list[list[tuple[float, float, str, str]]] = [[], []]
    stars: list[Line2D] = []
    for index, (name, group) in enumerate(grouped.items()):
        stops = [(run.stop_epoch, 100 * run.accuracy) for run in group if run.stop_epoch is not None]
        label = f'{name}, whole run' if stops else name
        style = look(index) | {'label': plain(label, _LEGEND_INCHES), 'marker': ''}
        style |= {'linestyle': '--'} if stops else {}
        x, y = _draw_curve(accuracy, [run.test for run in group], 'accuracy', 100, style)
        ends[0].append((x, y, f'{label} {y:.1f} %', style['color']))
        x, y = _draw_curve(loss, [run.train for run in group], 'loss', 1, style)
        ends[1].append((x, y, label, style['color']))
        if stops:
            label = f'{name}: the epoch chosen on validation images'
            star: dict[str, Any] = {'color': style['color'], 'mec': 'black', 'ms': 13, 'zorder': 3}
            stars += accuracy.plot(*zip(*stops, strict=True), '*', label=plain(label, _LEGEND_INCHES), **star)
    accuracy.set(xlabel='epoch', ylabel='test accuracy (%)')
    loss.set(xlabel='epoch', ylabel='training loss')
    for axes, found in zip((accuracy, loss), ends, strict=True):
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        if at_ends:
            _name_ends(axes, found)
    handles = stars if at_ends else accuracy.get_legend_handles_labels()[0]  # curves with names need no other words
    if handles:
        columns = 2 if len(handles) > 3 else 3
        figure.legend(handles=handles, loc='outside lower center', ncols=columns, frameon=False)
    seeds = max(map(len, grouped.values()))
    shown = f'mean over {seeds} seeds; band: lowest to highest seed' if seeds > 1 else 'one seed'
    found = [f'{name} {100 * statistics.fmean(run.accuracy for run in group):.1f} %' for name, group in grouped.items()]
    finding = f'Test accuracy: {"; ".join(found)}' if at_ends else ''
    figure.suptitle(plain('\n'.join(filter(None, [finding, about, shown])), 11), fontsize=11)
    return figure


def _draw_curve(
    axes: Axes, curves: Sequence[Mapping[str, Sequence[float]]], key: str, scale: int, style: dict[str, Any]
) -> tuple[float, float]:
    """Draw the mean of the curves in the band of all, and return where it ends."""
    columns = list(zip(*(curve[key] for curve in curves), strict=False))
    epochs = curves[0]['epoch'][: len(columns)]
    mean = [scale * statistics.fmean(column) for column in columns]
    axes.plot(epochs, mean, linewidth=1.8, **style)
    lowest, highest = ([scale * pick(column) for column in columns] for pick in (min, max))
    axes.fill_between(epochs, lowest, highest, alpha=0.2, color=style['color'], linewidth=0)
    return epochs[-1], mean[-1]


def _name_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the names of curves beside their ends, the lowest first, so far apart that all can be read."""
    lowest, highest = axes.get_ylim()
    gap = _GAP * (highest - lowest)
    place, above = float('-inf'), 0.0  # the name below, and half of its height
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        text = plain(name, _NAME_INCHES)
        half = gap * (1 + text.count('\n')) / 2
        place, above = max(place + above + half, y), half
        words: dict[str, Any] = {'textcoords': 'offset points', 'xytext': (6, 0), 'va': 'center', 'fontsize': 9}
        axes.annotate(text, (x, place), color=color, annotation_clip=False, **words)

"""Pictures of loss landscapes, drawn by matplotlib."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer_sam.extras import extra
from composer_sam.landscapes.storage import Landscape

with extra('diagnostics', __name__):
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import FuncNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

__all__ = [
    'COLORS',
    'LOG_COLORS',
    'Scale',
    'caption_inches',
    'contours',
    'curves',
    'heading',
    'look',
    'number',
    'plain',
    'png',
    'surfaces',
    'wrong_labels',
]

# Ratios of the largest loss to the smallest from which logarithms are drawn, as colours and as heights.
LOG_COLORS, _LOG_HEIGHTS = 10.0, 200.0
_SHADES, _RINGS = 128, 24  # at most so many contour lines
COLORS = [
    '#0072B2',
    '#D55E00',
    '#009E73',
    '#CC79A7',
    '#E69F00',
    '#56B4E9',
]  # safe for colour-blind readers
_LINES = ['-', '--', '-.', ':']
_MARKERS = 'osD^vP*Xhd'
_GAP = '#d9d9d9'
_STEPS = (
    (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8.5),
    (1, 1.5, 2, 3, 4, 5, 7),
    (1, 2, 3, 5),
    (1, 2, 5),
    (1, 3),
    (1,),
)  # round numbers within a decade


@dataclass(frozen=True)
class Scale:
    """One scale of losses for all the landscapes of a picture.

    Attributes:
        low: the smallest finite loss.
        high: the largest finite loss.
        log: whether the logarithm is drawn.
    """

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, landscapes: Sequence[Landscape], log_from: float = _LOG_HEIGHTS) -> Scale:
        """Return the scale of all ``landscapes``, logarithmic if the ratio of losses is at least ``log_from``."""
        finite = np.concatenate([landscape.loss[np.isfinite(landscape.loss)] for landscape in landscapes])
        if not finite.size:
            return cls(0.0, 1.0, False)
        low, high = float(finite.min()), float(finite.max())
        if low == high:
            return cls(low, low + (abs(low) or 1.0), False)
        return cls(low, high, low > 0 and high / low >= log_from)

    def height(self, loss: Any) -> Any:
        """Return the height at which a loss is drawn."""
        with np.errstate(divide='ignore', invalid='ignore'):
            return np.log10(loss) if self.log else np.asarray(loss, dtype=float)

    def round_losses(self, most: int) -> list[float]:
        """Return at most ``most`` round losses in the range, about evenly spread over the heights."""
        if not self.log:
            return self._within(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high))
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found: list[float] = []
        for steps in _STEPS:
            found = self._within(step * 10.0**decade for decade in decades for step in steps)
            if len(found) <= most:
                return found
        return found[:: -(-len(found) // most)]

    def _within(self, losses: Iterable[float]) -> list[float]:
        return [float(loss) for loss in losses if self.low <= loss <= self.high]


def curves(landscapes: Sequence[Landscape], title: str = '') -> Figure:
    """Draw the losses along lines in one pair of axes, and beside them the accuracies where all are known."""
    with_accuracy = all(landscape.accuracy is not None for landscape in landscapes)
    figure = Figure(figsize=(11, 4.6) if with_accuracy else (6.4, 4.6), layout='constrained')
    panels = np.atleast_1d(figure.subplots(1, 2 if with_accuracy else 1))
    scale = Scale.of(landscapes)
    for index, landscape in enumerate(landscapes):
        look: dict[str, Any] = {'color': COLORS[index % len(COLORS)], 'ls': _LINES[index % len(_LINES)], 'lw': 2}
        for axes, values, marked in _columns(landscape, panels):
            axes.plot(landscape.coordinates[0], _finite(values), label=plain(landscape.label, 4), **look)
            for mark, height in zip(landscape.marks, marked, strict=True):
                axes.plot(mark.at[0], height, 'o', color=look['color'], ms=6, mec='white', mew=1, zorder=3)
                if len(landscape.marks) > 1:
                    place: dict[str, Any] = {'xytext': (0, 9), 'textcoords': 'offset points', 'ha': 'center'}
                    axes.annotate(plain(mark.label, 2), (mark.at[0], height), **place)
    if scale.log:
        ticks = scale.round_losses(8)
        panels[0].set_yscale('log')
        panels[0].set_yticks(ticks, labels=[number(tick) for tick in ticks])
        panels[0].minorticks_off()
    for axes, name in zip(panels, ('loss', 'accuracy (%)'), strict=False):
        noisy = name != 'loss' and wrong_labels(landscapes[0])
        axes.set(xlabel=plain(landscapes[0].axes[0], 5), ylabel='accuracy on noisy labels (%)' if noisy else name)
        axes.margins(x=0)
        axes.grid(alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
    if len(landscapes) > 1:
        panels[0].legend(frameon=False)
    _entitle(figure, title)
    return figure


def contours(landscapes: Sequence[Landscape], title: str = '') -> Figure:
    """Draw the losses over planes side by side, with the same contour lines and the same colours."""
    scale = Scale.of(landscapes, LOG_COLORS)
    rows, columns = _arrangement(len(landscapes))
    width = 4.3 * columns + 1.1
    title = _wrapped(title, width)
    figure = Figure(figsize=(width, 4.55 * rows + caption_inches(title)), layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False)
    low, high = scale.height([scale.low, scale.high])
    # A little more than the range: rounding would otherwise put the extreme losses outside.
    shades = np.linspace(low, high + 1e-9 * (high - low), _SHADES + 1)
    lines = scale.height(scale.round_losses(_RINGS))
    solid: dict[str, Any] = {'negative_linestyles': 'solid'}  # not dashed for heights below zero
    ticks = scale.height(scale.round_losses(10))
    drawn = None
    for axes, landscape in zip(panels.flat, landscapes, strict=False):
        axes.set_facecolor(_GAP)
        heights = np.ma.masked_invalid(scale.height(landscape.loss))
        if heights.count():
            drawn = axes.contourf(*landscape.coordinates, heights, levels=shades, cmap='viridis')
            drawn.set_edgecolor('face')  # without it hairlines show between the shades
            crossed = [line for line in lines if heights.min() < line < heights.max()]
            rings = axes.contour(
                *landscape.coordinates, heights, levels=crossed, colors='white', linewidths=0.8, **solid
            )
            named = [line for line in crossed if np.isclose(line, ticks, rtol=1e-6, atol=1e-9).any()]
            axes.clabel(rings, named, fmt=lambda height: number(10**height if scale.log else height), fontsize=8)
        _mark_plane(axes, landscape)
        axes.set(xlabel=plain(landscape.axes[0], 4), ylabel=plain(landscape.axes[1], 4))
        axes.set_title(plain(heading(landscape, '\n'), 4), fontsize=11)
        axes.set_aspect('equal')
        axes.locator_params(nbins=5)
    for axes in panels.flat[len(landscapes) :]:
        axes.set_visible(False)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=panels, shrink=0.85, pad=0.02, label='loss')
        bar.set_ticks(list(ticks), labels=[number(loss) for loss in scale.round_losses(10)])
    _entitle(figure, title)
    return figure


def surfaces(landscapes: Sequence[Landscape], title: str = '') -> Figure:
    """Draw the losses over planes as surfaces side by side, with the same heights and the colours of the contours."""
    scale, colors = Scale.of(landscapes), Scale.of(landscapes, LOG_COLORS)
    rows, columns = _arrangement(len(landscapes))
    width = 5.2 * columns + 1.1
    title = _wrapped(title, width)
    height = 4.5 * rows + caption_inches(title)
    figure = Figure(figsize=(width, height))
    panels = figure.subplots(rows, columns, squeeze=False, subplot_kw={'projection': '3d', 'computed_zorder': False})
    figure.subplots_adjust(
        left=0.01, right=1 - 1.35 / width, bottom=0.03, top=1 - (caption_inches(title) + 0.3) / height,
        wspace=0.05, hspace=0.12,
    )  # fmt: skip
    low, high = (float(height) for height in scale.height([scale.low, scale.high]))
    floor = low - 0.25 * (high - low)
    ticks, lines = scale.round_losses(7), scale.height(scale.round_losses(_RINGS))
    thin: dict[str, Any] = {'linewidths': 0.8, 'negative_linestyles': 'solid'}
    look: dict[str, Any] = {'cmap': 'viridis', 'norm': _shades(scale, colors)}
    for axes, landscape in zip(panels.flat, landscapes, strict=False):
        x, y = np.meshgrid(*landscape.coordinates)
        z = _finite(scale.height(landscape.loss))
        if np.isfinite(z).any():
            axes.contour(x, y, np.ma.masked_invalid(z), levels=lines, zdir='z', offset=floor, zorder=0, **thin, **look)
        axes.plot_surface(x, y, z, rcount=120, ccount=120, lw=0.2, edgecolor=(1, 1, 1, 0.35), **look)
        axes.set_title(plain(heading(landscape, '\n'), 5), fontsize=11, y=0.97)
        axes.set_xlabel(plain(landscape.axes[0], 4), fontsize=9)
        axes.set_ylabel(plain(landscape.axes[1], 4), fontsize=9)
        axes.set_zlabel('loss', fontsize=9)
        axes.set_zlim(floor, high)
        axes.set_zticks(list(scale.height(ticks)), labels=[number(tick) for tick in ticks])
        axes.locator_params(axis='x', nbins=5)
        axes.locator_params(axis='y', nbins=5)
        axes.tick_params(labelsize=8, pad=1)
        axes.view_init(elev=26, azim=-55)
        axes.set_box_aspect((1, 1, 0.8), zoom=0.92)
    for axes in panels.flat[len(landscapes) :]:
        axes.set_visible(False)
    beside = figure.add_axes((1 - 0.95 / width, 0.2, 0.2 / width, 0.55))
    bar = figure.colorbar(ScalarMappable(**look), cax=beside, label='loss')
    ticks = colors.round_losses(10)
    bar.set_ticks(list(scale.height(ticks)), labels=[number(tick) for tick in ticks])
    bar.ax.minorticks_off()
    _entitle(figure, title)
    return figure


def look(index: int) -> dict[str, Any]:
    """Return the colour, marker and line of the curve of that number; after the last colour the lines change."""
    round_of_colors, place = divmod(index, len(COLORS))
    line = _LINES[round_of_colors % len(_LINES)]
    return {'color': COLORS[place], 'marker': _MARKERS[index % len(_MARKERS)], 'linestyle': line}


def png(figure: Figure, dpi: int = 150) -> bytes:
    """Return a figure as the content of a PNG file."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        # Names are the user's; a letter that the font does not have is drawn as a box.
        warnings.filterwarnings('ignore', message='Glyph .* missing from font')
        figure.savefig(content, format='png', dpi=dpi)
    return content.getvalue()


def plain(text: str, inches: float) -> str:
    """Return text that matplotlib draws as it is, without mathematics, in lines no longer than ``inches``."""
    lines = _wrapped(text, inches)
    # A label that begins with an underscore would be left out of legends.
    return ('\u200b' if text.startswith('_') else '') + lines.replace('$', r'\$')


def _columns(landscape: Landscape, panels: np.ndarray) -> list[tuple[Axes, np.ndarray, list[float]]]:
    """Return for each panel its axes, the values along the line, and the values of the marks."""
    columns = [(panels[0], landscape.loss, [mark.loss for mark in landscape.marks])]
    if len(panels) > 1 and landscape.accuracy is not None:
        columns.append(
            (panels[1], 100 * landscape.accuracy, [100 * (mark.accuracy or 0.0) for mark in landscape.marks])
        )
    return columns


def _mark_plane(axes: Axes, landscape: Landscape) -> None:
    """Draw a cross at every checkpoint, with its name where there are several."""
    for mark in landscape.marks:
        axes.plot(*mark.at, 'P', color='white', mec='black', mew=0.8, ms=8, zorder=4)
        if len(landscape.marks) > 1:
            box = {'boxstyle': 'round,pad=0.2', 'fc': 'white', 'ec': 'none', 'alpha': 0.8}
            place: dict[str, Any] = {'xytext': (0, 10), 'textcoords': 'offset points', 'ha': 'center'}
            words = plain(f'{mark.label}: {number(mark.loss)}', 2)
            axes.annotate(words, (mark.at[0], mark.at[1]), fontsize=8, bbox=box, **place)


def heading(landscape: Landscape, after_label: str = ': ') -> str:
    """Return the heading of a panel: the label, and where there is one checkpoint its loss and accuracy."""
    if len(landscape.marks) != 1:
        return landscape.label
    (mark,) = landscape.marks
    labels = ' on noisy labels' if wrong_labels(landscape) else ''
    accuracy = '' if mark.accuracy is None else f', accuracy{labels} {100 * mark.accuracy:.1f} %'
    return f'{landscape.label}{after_label}loss {number(mark.loss)}{accuracy}'


def wrong_labels(landscape: Landscape) -> float:
    """Return the fraction of wrong labels among those that loss and accuracy are measured on."""
    return landscape.about.get('wrong_labels', 0.0)


def number(value: float) -> str:
    """Return a number in three significant digits, or as a power of ten."""
    return f'{value:.3g}' if 1e-3 <= abs(value) < 1e4 or value == 0 else f'{value:.0e}'


def _finite(values: np.ndarray) -> np.ndarray:
    """Replace infinite values by not a number, which is drawn as a gap."""
    return np.where(np.isfinite(values), values, np.nan)


def _arrangement(count: int) -> tuple[int, int]:
    """Return the numbers of rows and columns for ``count`` panels."""
    columns = min(count, 3 if count != 4 else 2)
    return -(-count // columns), columns


def _shades(scale: Scale, colors: Scale) -> FuncNorm:
    """Return the part of the colours, in [0, 1], for a height: ``scale`` is that of heights, ``colors`` of colours."""
    low, high = (float(colors.height(loss)) for loss in (scale.low, scale.high))

    def part(height: Any) -> Any:
        with np.errstate(over='ignore'):
            loss = 10.0 ** np.asarray(height) if scale.log else np.asarray(height, dtype=float)
        return (colors.height(loss) - low) / (high - low)

    def height(part: Any) -> Any:
        found = low + np.asarray(part) * (high - low)
        return scale.height(10.0**found if colors.log else found)

    bottom, top = (float(height) for height in scale.height([scale.low, scale.high]))
    return FuncNorm((part, height), bottom, top)


def _wrapped(title: str, inches: float) -> str:
    """Return a title whose lines are no longer than a figure is wide."""
    return '\n'.join(textwrap.fill(line, int(12 * inches)) for line in title.splitlines())


def caption_inches(title: str) -> float:
    """Return the height of a title."""
    return 0.22 * (1 + title.count('\n')) if title else 0.0


def _entitle(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(plain(title, figure.get_figwidth()), fontsize=11)

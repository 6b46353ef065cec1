"""The picture of a survival study: what is lost to learning, to fewer bits and to noise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from composer_sam.extras import extra
from composer_sam.landscapes.pictures import look, plain
from composer_sam.studies.survival.tables import Survivor, least_lost, mean_of
from composer_sam.studies.texts import bar, grouped

with extra('diagnostics', __name__):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['draw']

_LEGEND_INCHES = 4


def draw(found: Sequence[Survivor]) -> Figure:
    """Draw the growth of the loss on the first text against the loss on the other, the bits, and the noise.

    Lines join means over the seeds; small points, and bars from the lowest to the highest, are the seeds.
    """
    by_label = grouped(found, lambda one: one.label)
    trials = found[0].measured
    wanted: list[Any] = [_draw_frontier] if any(one.points for one in found) else []
    wanted += [_draw_bits] if trials.quantized else []
    wanted += [_draw_noise] if trials.noisy else []
    figure = Figure(figsize=(4.8 * max(1, len(wanted)), 5), layout='constrained')
    panels: Any = figure.subplots(1, max(1, len(wanted)), squeeze=False)[0]
    for panel, drawn in zip(panels, wanted, strict=False):
        for index, (label, group) in enumerate(by_label.items()):
            drawn(panel, group, look(index) | {'label': plain(label, _LEGEND_INCHES)})
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=min(4, max(1, len(labels))), frameon=False)
    seeds = max(map(len, by_label.values()))
    shown = f'mean over {seeds} seeds; small points and bars: the seeds' if seeds > 1 else 'one seed'
    finding = '; '.join(f'{what}: {label} ({value:.4f})' for what, label, value in least_lost(found))
    title = '\n'.join(filter(None, [f'Least lost {finding}' if finding else '', shown]))
    figure.suptitle(plain(title, figure.get_figwidth()), fontsize=11)
    return figure


def _draw_frontier(axes: Axes, group: Sequence[Survivor], style: dict[str, Any]) -> None:
    axes.set(
        title='Lost by fine-tuning (lower left is better)',
        xlabel='loss on the other text',
        ylabel='growth of the loss on the first text',
    )
    points = [one.points for one in group]
    whole = len({len(seed) for seed in points}) == 1  # where a fine-tuning has failed, there are no means
    means = [_mean(column) for column in zip(*points, strict=True)] if whole else []
    axes.plot([x for x, _ in means], [y for _, y in means], markersize=6, linewidth=1.3, **style)
    if len(group) > 1:
        seeds = [point for seed in points for point in seed]
        small: dict[str, Any] = {'color': style['color'], 'markersize': 3, 'alpha': 0.5}
        axes.plot([x for x, _ in seeds], [y for _, y in seeds], style['marker'], **small)


def _draw_bits(axes: Axes, group: Sequence[Survivor], style: dict[str, Any]) -> None:
    axes.set(title='Lost by rounding the weights', xlabel='bits per weight', ylabel='growth of the loss')
    bits = sorted(map(int, group[0].measured.quantized), reverse=True)
    values = [[one.measured.quantized[str(count)] for one in group] for count in bits]
    _draw_growth(axes, group, list(range(len(bits))), values, style)
    axes.set_xticks(range(len(bits)), [str(count) for count in bits])


def _draw_noise(axes: Axes, group: Sequence[Survivor], style: dict[str, Any]) -> None:
    axes.set(
        title='Lost by noise on the weights', xlabel="noise, in parts of a matrix's rms", ylabel='growth of the loss'
    )
    sizes = sorted(group[0].measured.noisy, key=float)
    values = [[mean_of(one.measured.noisy[size]) for one in group] for size in sizes]
    _draw_growth(axes, group, [float(size) for size in sizes], values, style)


def _draw_growth(
    axes: Axes,
    group: Sequence[Survivor],
    places: Sequence[float],
    values: Sequence[Sequence[float | None]],
    style: dict[str, Any],
) -> None:
    """Draw the means of the growth at every place, with bars from the lowest to the highest seed."""
    drawn = []
    for place, column in zip(places, values, strict=True):
        pairs = zip(column, group, strict=True)
        grown = [v - one.measured.loss for v, one in pairs if v is not None and one.measured.loss is not None]
        if len(grown) == len(group):
            drawn.append((place, *bar(grown)))
    if drawn:
        x, y, below, above = zip(*drawn, strict=True)
        axes.errorbar(x, y, [below, above], markersize=5, linewidth=1.3, capsize=2, **style)


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points)

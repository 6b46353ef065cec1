"""Pictures and pages of loss landscapes: their content, their scale, and that a page loads nothing."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import Collection
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from composer_sam.landscapes.page import page
from composer_sam.landscapes.pictures import LOG_COLORS, Scale, contours, curves, heading, surfaces
from composer_sam.landscapes.storage import Landscape
from composer_sam.landscapes.subspaces import Mark


def plane(label: str = 'A', curvature: float = 1.0, floor: float = 0.5, accuracy: bool = True) -> Landscape:
    x, y = np.linspace(-1, 1, 7), np.linspace(-1, 1, 5)
    bowl = x[None, :] ** 2 + 2 * y[:, None] ** 2
    loss = floor + curvature * bowl
    mark = Mark(label, (0.0, 0.0), floor, 0.75 if accuracy else None)
    return Landscape(label, ('u', 'v'), (x, y), loss, 1 / (1 + bowl) if accuracy else None, (mark,))


def line(label: str = 'A', curvature: float = 1.0, accuracy: bool = True) -> Landscape:
    x = np.linspace(-1, 1, 9)
    loss = 0.1 + curvature * x**2
    return Landscape(label, ('u',), (x,), loss, 1 / (1 + loss) if accuracy else None, (Mark(label, (0.0,), 0.1, 0.9),))


def with_gaps(landscape: Landscape) -> Landscape:
    landscape.loss.flat[0], landscape.loss.flat[1], landscape.loss.flat[-1] = np.nan, np.inf, np.inf
    return landscape


def drawn(figure: Figure, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        figure.savefig(tmp_path / 'figure.png', dpi=40)
    assert (tmp_path / 'figure.png').read_bytes().startswith(b'\x89PNG')


def levels(sets: Collection) -> list[float]:
    assert isinstance(sets, ContourSet)
    return list(sets.levels)


def test_a_scale_spans_all_landscapes_and_is_logarithmic_for_wide_ranges() -> None:
    scale = Scale.of([plane(floor=0.5), plane(curvature=3, floor=1)])
    assert (scale.low, scale.high, scale.log) == (0.5, 10.0, False)
    assert Scale.of([plane(floor=0.5), plane(curvature=3, floor=1)], log_from=10).log
    assert Scale.of([plane(floor=1e-3)]).log
    assert not Scale.of([plane(floor=0.0)]).log  # no logarithm of zero
    assert not Scale.of([plane(floor=-1.0, curvature=1e5)]).log


@pytest.mark.parametrize(
    'scale', [Scale(0.4, 7.1, True), Scale(0.4, 7.1, False), Scale(1e-8, 1e9, True), Scale(-3, 4, False)]
)
def test_round_losses_are_in_the_range_ascending_and_not_too_many(scale: Scale) -> None:
    for most in (7, 24):
        losses = scale.round_losses(most)
        assert 3 <= len(losses) <= most + 1
        assert losses == sorted(set(losses))
        assert scale.low <= losses[0] and losses[-1] <= scale.high


def test_contours_of_several_checkpoints_share_colours_and_levels(tmp_path: Path) -> None:
    figure = contours([plane('A'), plane('B', curvature=0.2, floor=1)], 'title')
    first, second, bar = figure.axes
    filled = [axes.collections[0] for axes in (first, second)]
    assert [sets.norm.vmin for sets in filled] == [filled[0].norm.vmin] * 2
    assert [levels(sets) for sets in filled] == [levels(filled[0])] * 2
    rings = [set(levels(axes.collections[1])) for axes in (first, second)]
    assert rings[1] < rings[0]
    assert first.get_title() == 'A\nloss 0.5, accuracy 75.0 %'
    assert (first.get_xlabel(), first.get_ylabel(), bar.get_ylabel()) == ('u', 'v', 'loss')
    drawn(figure, tmp_path)


def test_surfaces_share_heights(tmp_path: Path) -> None:
    figure = surfaces([plane('A'), plane('B', curvature=0.2, floor=1)])
    first, second, bar = figure.axes
    assert isinstance(first, Axes3D) and isinstance(second, Axes3D)
    assert first.get_zlim() == second.get_zlim()
    assert first.get_zlim()[1] == pytest.approx(3.5)
    assert bar.get_ylabel() == 'loss'
    drawn(figure, tmp_path)


@pytest.mark.parametrize('floor', [0.5, 0.05, 1e-3])  # linear; logarithmic colours; logarithmic heights too
def test_a_loss_has_one_colour_in_all_pictures_of_it(floor: float) -> None:
    landscapes = [plane('A', floor=floor), plane('B', curvature=0.2, floor=1)]
    colors, heights = Scale.of(landscapes, LOG_COLORS), Scale.of(landscapes)
    filled = contours(landscapes).axes[0].collections[0]
    surface = next(one for one in surfaces(landscapes).axes[0].collections if isinstance(one, Poly3DCollection))
    page_colours = Drawn.read(page(landscapes, 'title'))
    axis = page_colours.layout['coloraxis']
    for loss in (floor, floor + 0.01, 1.0, 2.0, floor + 3):
        part = np.asarray(filled.norm(colors.height(loss))).item()
        assert np.asarray(surface.norm(heights.height(loss))).item() == pytest.approx(part, abs=1e-6)
        assert (colors.height(loss) - axis['cmin']) / (axis['cmax'] - axis['cmin']) == pytest.approx(part, abs=1e-6)
    np.testing.assert_allclose(page_colours.data[2]['surfacecolor'], colors.height(landscapes[1].loss))
    assert not any('coloraxis' in key for view in page_colours.views.values() for key in view[1])  # in both views


def test_headings_say_that_the_labels_are_noisy() -> None:
    noisy = replace(plane(), about={'wrong_labels': 0.4})
    assert heading(noisy) == 'A: loss 0.5, accuracy on noisy labels 75.0 %'
    assert contours([noisy]).axes[0].get_title() == 'A\nloss 0.5, accuracy on noisy labels 75.0 %'
    assert Drawn.read(page([noisy], 'title')).layout['annotations'][0]['text'] == (
        'A<br>loss 0.5, accuracy on noisy labels 75.0 %'
    )
    accuracies = curves([replace(line(), about={'wrong_labels': 0.4})]).axes[1]
    assert accuracies.get_ylabel() == 'accuracy on noisy labels (%)'


def test_a_caption_is_no_wider_than_its_picture(tmp_path: Path) -> None:
    figure = contours([plane()], 'title\n' + 'a long line about samples and labels ' * 4)
    drawn(figure, tmp_path)
    title = figure._suptitle  # pyright: ignore[reportAttributeAccessIssue]
    assert title.get_text().startswith('title\na long line')
    assert title.get_window_extent().width < figure.bbox.width


def test_curves_are_in_one_pair_of_axes_with_accuracies_beside_them(tmp_path: Path) -> None:
    landscapes = [line('A'), line('B', curvature=0.3)]
    figure = curves(landscapes)
    losses, accuracies = figure.axes
    shown = [one for one in losses.lines if np.size(one.get_xdata()) > 1]
    assert [one.get_label() for one in shown] == ['A', 'B']
    legend = losses.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ['A', 'B']
    for one, landscape in zip(shown, landscapes, strict=True):
        np.testing.assert_array_equal(one.get_ydata(), landscape.loss)
    assert len({(one.get_color(), one.get_linestyle()) for one in shown}) == 2
    assert accuracies.get_ylabel() == 'accuracy (%)'
    drawn(figure, tmp_path)
    assert len(curves([line('A'), line('B', accuracy=False)]).axes) == 1


@pytest.mark.parametrize('draw', [contours, surfaces])
@pytest.mark.parametrize('floor', [0.5, 1e-6])
def test_planes_with_gaps_are_drawn(draw: Any, floor: float, tmp_path: Path) -> None:
    drawn(draw([with_gaps(plane(floor=floor)), plane('B', floor=floor)]), tmp_path)


def test_lines_with_gaps_are_drawn(tmp_path: Path) -> None:
    figure = curves([with_gaps(line())])
    values = np.asarray(figure.axes[0].lines[0].get_ydata())
    assert np.isnan(values[[0, 1, -1]]).all() and np.isfinite(values[2:-1]).all()
    drawn(figure, tmp_path)


@pytest.mark.parametrize('value', [np.nan, 1.0])
def test_a_landscape_without_a_finite_loss_or_with_a_single_one_is_drawn(value: float, tmp_path: Path) -> None:
    flat, flat_line = plane(), line()
    flat.loss[:], flat_line.loss[:] = value, value
    for figure in (contours([flat]), surfaces([flat]), curves([flat_line])):
        drawn(figure, tmp_path)
    heights = Drawn.read(page([flat], 'flat')).views['linear loss'][0]['z'][0]
    assert heights == [[None if np.isnan(value) else value] * 7] * 5


@pytest.mark.parametrize('count', [1, 3, 4, 7])
def test_any_number_of_checkpoints_has_a_panel_each(count: int, tmp_path: Path) -> None:
    landscapes = [plane(str(index)) for index in range(count)]
    for figure, bars in ((contours(landscapes), 1), (surfaces(landscapes), 1)):
        assert sum(axes.get_visible() for axes in figure.axes) == count + bars
        drawn(figure, tmp_path)


def test_a_plane_of_several_checkpoints_names_them() -> None:
    landscape = plane()
    marks = (Mark('A', (0.0, 0.0), 0.5), Mark('B', (0.5, 0.5), 1.25))
    both = Landscape('through A and B', landscape.axes, landscape.coordinates, landscape.loss, None, marks)
    assert [text.get_text() for text in contours([both]).axes[0].texts if ':' in text.get_text()] == [
        'A: 0.5',
        'B: 1.25',
    ]
    assert heading(both) == 'through A and B'


class Loads(HTMLParser):
    """Records what a browser would load for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.policy = ''
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == 'script'
        given = dict(attrs)
        self.found += [str(given[name]) for name in ('src', 'href', 'data', 'action') if name in given]
        if given.get('http-equiv') == 'Content-Security-Policy':
            self.policy = str(given['content'])


@dataclass(frozen=True)
class Drawn:
    """The arguments of the call that draws a page's figure, and the views its buttons choose."""

    data: list[dict[str, Any]]
    layout: dict[str, Any]
    config: dict[str, Any]

    @classmethod
    def read(cls, html: str) -> Drawn:
        _, _, text = html.partition('Plotly.newPlot(')
        found = []
        for _ in range(4):  # the element, the traces, the layout and the configuration
            value, end = json.JSONDecoder().raw_decode(text := text.lstrip(' ,\n'))
            found.append(value)
            text = text[end:]
        return cls(*found[1:])

    @property
    def menu(self) -> dict[str, Any]:
        (menu,) = self.layout['updatemenus']
        return menu

    @property
    def views(self) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        return {button['label']: tuple(button['args']) for button in self.menu['buttons']}

    @property
    def first(self) -> str:
        return list(self.views)[self.menu['active']]


def test_a_page_loads_nothing_and_forbids_to() -> None:
    html = page([plane()], 'title')
    loads = Loads()
    loads.feed(html)
    assert loads.found == []
    assert loads.scripts == 3
    policy = dict(rule.split(maxsplit=1) for rule in loads.policy.split(';'))
    assert policy['default-src'] == "'none'"
    assert not any('http' in sources or '*' in sources for sources in policy.values())
    assert policy['form-action'] == "'none'"
    config = Drawn.read(html).config
    assert config['showSendToCloud'] is False and not config.get('plotlyServerURL')
    assert 'Plotly' in html and len(html) > 1e6  # the library is in it


def test_a_page_of_surfaces_holds_its_numbers_linear_and_logarithmic() -> None:
    landscapes = [plane('A'), plane('B', curvature=0.2, floor=1)]
    drawn = Drawn.read(page(landscapes, 'title'))
    traces, linear, log = drawn.data, drawn.views['linear loss'], drawn.views['log loss']
    assert [trace['type'] for trace in traces] == ['surface', 'scatter3d'] * 2
    for index, landscape in enumerate(landscapes):
        surface = traces[2 * index]
        assert surface['x'] == landscape.coordinates[0].tolist()
        assert surface['y'] == landscape.coordinates[1].tolist()
        assert linear[0]['z'][2 * index] == landscape.loss.tolist()
        np.testing.assert_allclose(log[0]['z'][2 * index], np.log10(landscape.loss))
        corner = f'at (-1, -1)<br>loss {landscape.loss[0, 0]:.3g}<br>accuracy 25.0 %'
        assert surface['text'][0][0] == corner
        assert surface['text'][1][0].startswith('at (-1, -0.5)')
        # With a template the library looks texts up the other way round.
        assert surface['hoverinfo'] == 'text' and 'hovertemplate' not in surface
        assert surface['coloraxis'] == 'coloraxis'
        assert linear[0]['z'][2 * index + 1] == [landscape.marks[0].loss]
    layout = linear[1]
    assert layout['scene.zaxis.range'] == layout['scene2.zaxis.range']
    assert (drawn.layout['coloraxis']['cmin'], drawn.layout['coloraxis']['cmax']) == (0.5, 3.5)


def test_a_page_of_curves_holds_its_numbers() -> None:
    landscape = with_gaps(line())
    drawn = Drawn.read(page([landscape], 'title'))
    curve = drawn.data[0]
    assert curve['x'] == landscape.coordinates[0].tolist()
    assert curve['y'] == [None, None, *landscape.loss[2:-1].tolist(), None]
    assert drawn.views['log loss'][1]['yaxis.type'] == 'log'


def test_the_scale_starts_logarithmic_only_where_it_is_in_the_pictures() -> None:
    assert Drawn.read(page([plane()], 'title')).first == 'linear loss'
    assert Drawn.read(page([plane(floor=1e-4)], 'title')).first == 'log loss'


def test_text_is_text_in_a_page() -> None:
    hostile = '</script><img src="http://example.org/x">$figure\'"\\'
    html = page([plane(hostile)], hostile, [hostile])
    loads = Loads()
    loads.feed(html)
    assert loads.found == [] and loads.scripts == 3
    assert Drawn.read(html).layout['annotations'][0]['text'].startswith('&lt;/script&gt;')

"""A page of loss landscapes to turn and read values off, in one HTML file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from composer_sam.landscapes.pictures import COLORS, Scale, heading, number
from composer_sam.landscapes.storage import Landscape

__all__ = ['page']

_PANELS_IN_A_ROW = 3
_RINGS = 20  # contour lines
_MARK = '#e8590c'  # seen on all of viridis and on white
_CAMERA = {'eye': {'x': 1.25, 'y': -1.75, 'z': 0.8}, 'center': {'x': 0, 'y': 0, 'z': -0.18}}
_SCENE = {'aspectmode': 'manual', 'aspectratio': {'x': 1, 'y': 1, 'z': 0.8}, 'camera': _CAMERA}
_FONT = {'family': 'system-ui, -apple-system, "Segoe UI", sans-serif', 'size': 13, 'color': '#24292f'}


def page(landscapes: Sequence[Landscape], title: str, notes: Sequence[str] = ()) -> str:
    """The page's HTML. Planes are surfaces that turn together, on one scale of heights and colours; lines are curves.

    The drawing library is in the page, which makes it 5 MB large, and the page forbids the browser to load anything.

    Args:
        landscapes: All planes or all lines.
        title: What stands at the top.
        notes: Lines of small print under it.
    """
    scale = Scale.of(landscapes)
    figure, views = (_surfaces if len(landscapes[0].axes) == 2 else _curves)(landscapes, scale)
    content = {
        'TITLE': _text(title),
        'NOTES': ''.join(f'<p>{_text(note)}</p>' for note in notes),
        'LIBRARY': get_plotlyjs(),
        'FIGURE': _json(figure.to_plotly_json()),
        'VIEWS': _json(views),
        'START': 'log' if scale.log else 'linear',
    }
    head, *parts = _PAGE.split('@@')
    return head + ''.join(content.get(part, part) for part in parts)


def _surfaces(landscapes: Sequence[Landscape], scale: Scale) -> tuple[go.Figure, dict[str, Any]]:
    """The planes as surfaces, and what changes in them between linear and logarithmic heights."""
    columns = min(len(landscapes), _PANELS_IN_A_ROW)
    rows = -(-len(landscapes) // columns)
    figure = make_subplots(
        rows,
        columns,
        specs=[[{'type': 'surface'}] * columns] * rows,
        subplot_titles=[_text(heading(landscape)) for landscape in landscapes],
        horizontal_spacing=0.01,
        vertical_spacing=0.05,
    )
    for index, landscape in enumerate(landscapes):
        place: dict[str, Any] = {'row': index // columns + 1, 'col': index % columns + 1}
        figure.add_trace(_surface(landscape), **place)
        figure.add_trace(_points(landscape), **place)
        named = [{'title': {'text': _text(axis), 'font': {'size': 11}}, 'zeroline': False} for axis in landscape.axes]
        figure.update_scenes(
            xaxis=named[0], yaxis=named[1], zaxis={'title': {'text': 'loss'}, 'zeroline': False}, **_SCENE, **place
        )
    figure.update_layout(
        coloraxis={'colorscale': 'Viridis', 'colorbar': {'title': {'text': 'loss'}, 'len': 0.75, 'thickness': 16}},
        height=640 * rows,
        margin={'l': 10, 'r': 10, 't': 50, 'b': 10},
    )
    _dress(figure)
    views = {}
    for name in ('linear', 'log'):
        drawn = Scale(scale.low, scale.high, name == 'log' and scale.low > 0)
        low, high = (float(height) for height in drawn.height([scale.low, scale.high]))
        heights = []
        for landscape in landscapes:
            heights += [drawn.height(landscape.loss), drawn.height([mark.loss for mark in landscape.marks])]
        rings = {'contours.z.start': low, 'contours.z.end': high, 'contours.z.size': (high - low) / _RINGS}
        views[name] = {'data': {'z': heights, **rings}, 'layout': _heights(drawn, len(landscapes))}
    return figure, views


def _surface(landscape: Landscape) -> go.Surface:
    x, y = landscape.coordinates
    return go.Surface(
        x=x.tolist(),
        y=y.tolist(),
        text=np.array(_hover(landscape), dtype=object),  # of lists plotly would make one text per row
        hoverinfo='text',  # a template would take its text from [x][y]
        coloraxis='coloraxis',
        contours={
            'x': {'highlight': False},
            'y': {'highlight': False},
            'z': {'show': True, 'color': '#8b949e', 'width': 1, 'project': {'z': True}, 'highlightcolor': 'white'},
        },
    )


def _points(landscape: Landscape) -> go.Scatter3d:
    """The checkpoints."""
    return go.Scatter3d(
        x=[mark.at[0] for mark in landscape.marks],
        y=[mark.at[1] for mark in landscape.marks],
        mode='markers' if len(landscape.marks) == 1 else 'markers+text',
        marker={'size': 4, 'color': _MARK, 'line': {'color': 'white', 'width': 1}},
        text=[_text(mark.label) for mark in landscape.marks],
        textfont={'color': _MARK, 'size': 14, 'weight': 700},
        customdata=[number(mark.loss) for mark in landscape.marks],
        hovertemplate='%{text}<br>loss %{customdata}<extra></extra>',
        showlegend=False,
    )


def _heights(scale: Scale, panels: int) -> dict[str, Any]:
    """The layout of so many panels for heights and colours of the ``scale``."""
    ticks = scale.round_losses(7)
    low, high = (float(height) for height in scale.height([scale.low, scale.high]))
    axis = {'tickvals': scale.height(ticks), 'ticktext': [number(tick) for tick in ticks]}
    layout: dict[str, Any] = {'coloraxis.cmin': low, 'coloraxis.cmax': high}
    layout |= {f'coloraxis.colorbar.{key}': value for key, value in axis.items()}
    for scene in ('scene', *(f'scene{panel}' for panel in range(2, panels + 1))):
        layout |= {f'{scene}.zaxis.{key}': value for key, value in axis.items()}
        layout[f'{scene}.zaxis.range'] = [low - 0.2 * (high - low), high + 0.03 * (high - low)]
    return layout


def _curves(landscapes: Sequence[Landscape], scale: Scale) -> tuple[go.Figure, dict[str, Any]]:
    """The lines as curves in one pair of axes, and what changes in them between linear and logarithmic heights."""
    figure = go.Figure()
    for index, landscape in enumerate(landscapes):
        color = COLORS[index % len(COLORS)]
        name = _text(landscape.label)
        x = landscape.coordinates[0].tolist()
        figure.add_trace(
            go.Scatter(
                x=x,
                y=_gaps(landscape.loss),
                name=name,
                mode='lines+markers',
                line={'color': color, 'width': 2.5},
                marker={'size': 4},
                text=_hover(landscape),
                hovertemplate='%{text}<extra>%{fullData.name}</extra>',
            )
        )
        figure.add_trace(
            go.Scatter(
                x=[mark.at[0] for mark in landscape.marks],
                y=_gaps([mark.loss for mark in landscape.marks]),
                mode='markers+text' if len(landscape.marks) > 1 else 'markers',
                text=[_text(mark.label) for mark in landscape.marks],
                textposition='top center',
                marker={'size': 11, 'color': color, 'line': {'color': 'white', 'width': 2}},
                hoverinfo='skip',
                showlegend=False,
            )
        )
    figure.update_layout(
        height=600, hovermode='x', plot_bgcolor='white', legend={'x': 0.5, 'xanchor': 'center', 'y': 0.98}
    )
    figure.update_layout(margin={'l': 70, 'r': 20, 't': 40, 'b': 60})
    figure.update_xaxes(title_text=_text(landscapes[0].axes[0]), gridcolor='#e5e7eb', zeroline=False)
    figure.update_yaxes(title_text='loss', gridcolor='#e5e7eb', zeroline=False)
    _dress(figure)
    views = {name: {'data': {}, 'layout': {'yaxis.type': name, 'yaxis.autorange': True}} for name in ('linear', 'log')}
    return figure, views


def _dress(figure: go.Figure) -> None:
    figure.update_layout(
        font=_FONT,
        hoverlabel={'bgcolor': 'white', 'font': {'color': '#24292f'}},
        template='none',
    )


def _hover(landscape: Landscape) -> list[Any]:
    """What is shown at every point."""
    lines = _worded(landscape.loss, lambda loss: f'loss {number(loss)}')
    if landscape.accuracy is not None:
        lines = lines + _worded(landscape.accuracy, lambda value: f'<br>accuracy {100 * value:.1f} %')
    at = [[f'{value:.3g}' for value in axis] for axis in landscape.coordinates]
    if len(at) == 1:
        return [f'at {x}<br>{line}' for x, line in zip(at[0], lines, strict=True)]
    return [
        [f'at ({x}, {y})<br>{line}' for x, line in zip(at[0], row, strict=True)]
        for y, row in zip(at[1], lines, strict=True)
    ]


def _worded(values: np.ndarray, word: Callable[[float], str]) -> np.ndarray:
    words = np.empty(values.shape, dtype=object)
    for place, value in np.ndenumerate(values):
        words[place] = word(value)
    return words


def _gaps(values: Any) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in np.asarray(values, dtype=float).tolist()]


def _text(text: str) -> str:
    """Text as HTML, also inside of plotly, which reads some tags."""
    return text.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')


def _json(value: Any) -> str:
    """JSON that may stand in a script; what is not a number becomes null, a gap."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(inner) for key, inner in item.items()}
        if isinstance(item, (list, tuple)):
            return [plain(inner) for inner in item]
        if isinstance(item, np.ndarray):
            return plain(item.tolist())
        return None if isinstance(item, float) and not np.isfinite(item) else item

    return json.dumps(plain(value), separators=(',', ':')).replace('</', '<\\/')


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval' blob:;
 style-src 'unsafe-inline'; img-src data: blob:; font-src data:; worker-src blob:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@@TITLE@@</title>
<style>
body { font: 15px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; color: #24292f; margin: 24px 32px; }
h1 { font-size: 22px; font-weight: 600; margin: 0 0 4px; }
p { margin: 0; color: #57606a; font-size: 13px; }
header { display: flex; gap: 24px; align-items: flex-end; justify-content: space-between; flex-wrap: wrap; }
fieldset { border: 1px solid #d0d7de; border-radius: 8px; padding: 0; margin: 0; display: flex; overflow: hidden; }
button { border: 0; background: white; font: inherit; font-size: 13px; padding: 6px 14px; cursor: pointer; }
button + button { border-left: 1px solid #d0d7de; }
button[aria-pressed=true] { background: #31688e; color: white; }
</style>
</head>
<body>
<header>
<div><h1>@@TITLE@@</h1>@@NOTES@@</div>
<fieldset aria-label="scale of the loss">
<button type="button" id="linear">linear loss</button><button type="button" id="log">log loss</button>
</fieldset>
</header>
<div id="figure"></div>
<script>@@LIBRARY@@</script>
<script>
const figure = @@FIGURE@@, views = @@VIEWS@@;
const div = document.getElementById('figure');
const scenes = Object.keys(figure.layout).filter(key => key.startsWith('scene'));

function show(name) {
  for (const button of document.querySelectorAll('button')) button.setAttribute('aria-pressed', button.id === name);
  return Plotly.update(div, views[name].data, views[name].layout);
}

// All surfaces are seen from where the one that is turned is seen from.
let turning = false;
function follow(change) {
  const turned = scenes.find(scene => change[scene + '.camera']);
  if (turning || !turned) return;
  turning = true;
  const cameras = {};
  for (const scene of scenes) if (scene !== turned) cameras[scene + '.camera'] = change[turned + '.camera'];
  Plotly.relayout(div, cameras).then(() => { turning = false; });
}

// No button that sends the data to a server.
const config = {responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: ''};

Plotly.newPlot(div, figure.data, figure.layout, config).then(() => {
  if (scenes.length > 1) { div.on('plotly_relayouting', follow); div.on('plotly_relayout', follow); }
  for (const name of Object.keys(views)) document.getElementById(name).onclick = () => show(name);
  return show('@@START@@');
});
</script>
</body>
</html>
"""

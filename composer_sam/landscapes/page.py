"""A page of interactive loss landscapes, in one HTML file that loads nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from string import Template
from typing import Any

import numpy as np

from composer_sam.extras import extra
from composer_sam.landscapes.pictures import COLORS, LOG_COLORS, Scale, heading, number
from composer_sam.landscapes.storage import Landscape

with extra('diagnostics', __name__):
    import plotly.graph_objects as go
    import plotly.io
    from plotly.subplots import make_subplots

__all__ = ['page']

_PANELS_IN_A_ROW = 3
_RINGS = 20  # contour lines
_MARK = '#e8590c'  # a colour that is seen on all of viridis and on white
_CAMERA = {'eye': {'x': 1.25, 'y': -1.75, 'z': 0.8}, 'center': {'x': 0, 'y': 0, 'z': -0.18}}
_SCENE = {'aspectmode': 'manual', 'aspectratio': {'x': 1, 'y': 1, 'z': 0.8}, 'camera': _CAMERA}
_FONT = {'family': 'system-ui, -apple-system, "Segoe UI", sans-serif', 'size': 13, 'color': '#24292f'}
_CONFIG = {'responsive': True, 'displaylogo': False, 'showSendToCloud': False}  # no button that sends the data away

# Traces and layout of a figure on one scale of the loss, as the arguments of plotly's update().
View = tuple[dict[str, Any], dict[str, Any]]


def page(landscapes: Sequence[Landscape], title: str, notes: Sequence[str] = ()) -> str:
    """Return the HTML of a page with the landscapes and buttons for a linear and a logarithmic scale of the loss.

    Planes are surfaces on one scale of heights and colours, which turn together; lines are curves. The page is 5 MB
    large, as the drawing library is part of it, and forbids the browser to load anything.

    Args:
        landscapes: all planes, or all lines.
        title: the heading.
        notes: lines of small print below the heading.
    """
    scale = Scale.of(landscapes)
    figure, views = (_surfaces if len(landscapes[0].axes) == 2 else _curves)(landscapes, scale)
    _add_buttons(figure, views, active='log' if scale.log else 'linear')
    drawn = plotly.io.to_html(
        figure,
        config=_CONFIG,
        include_plotlyjs=True,
        full_html=False,
        post_script=_SCRIPT.replace('CONFIG', json.dumps(_CONFIG)),
        div_id='figure',
    )
    small_print = ''.join(f'<p>{_text(note)}</p>' for note in notes)
    return _PAGE.substitute(title=_text(title), notes=small_print, figure=drawn)


def _add_buttons(figure: go.Figure, views: dict[str, View], active: str) -> None:
    """Add one button per view; the page shows the active one first."""
    buttons = [{'label': f'{name} loss', 'method': 'update', 'args': list(view)} for name, view in views.items()]
    menu = {
        'type': 'buttons',
        'direction': 'right',
        'buttons': buttons,
        'active': list(views).index(active),
        'showactive': True,
        'bgcolor': '#d8dee4',  # the active button is nearly white
        'bordercolor': '#d0d7de',
        'x': 0.0,
        'xanchor': 'left',
        'y': 1.0,
        'yanchor': 'bottom',
        'pad': {'b': 48},
    }
    figure.update_layout(updatemenus=[menu])


def _surfaces(landscapes: Sequence[Landscape], scale: Scale) -> tuple[go.Figure, dict[str, View]]:
    """Return the planes as surfaces, without heights, and the views that set linear and logarithmic heights."""
    columns = min(len(landscapes), _PANELS_IN_A_ROW)
    rows = -(-len(landscapes) // columns)
    figure = make_subplots(
        rows,
        columns,
        specs=[[{'type': 'surface'}] * columns] * rows,
        subplot_titles=[_text(heading(landscape, '\n')).replace('\n', '<br>') for landscape in landscapes],
    )
    colors = Scale.of(landscapes, LOG_COLORS)
    bounds = [float(height) for height in colors.height([scale.low, scale.high])]
    ticks = colors.round_losses(7)
    bar = {'tickvals': colors.height(ticks).tolist(), 'ticktext': [number(tick) for tick in ticks]}
    for index, landscape in enumerate(landscapes):
        place: dict[str, Any] = {'row': index // columns + 1, 'col': index % columns + 1}
        figure.add_trace(_surface(landscape, colors), **place)
        figure.add_trace(_points(landscape), **place)
        named = [
            {
                'title': {'text': _text(axis), 'font': {'size': 11}},
                'zeroline': False,
                'nticks': 5,
                'tickfont': {'size': 10},
            }
            for axis in landscape.axes
        ]
        figure.update_scenes(
            xaxis=named[0],
            yaxis=named[1],
            zaxis={'title': {'text': 'loss', 'font': {'size': 11}}, 'zeroline': False, 'tickfont': {'size': 10}},
            **_SCENE,
            **place,
        )
    figure.update_layout(
        coloraxis={
            'colorscale': 'Viridis',
            'cmin': bounds[0],
            'cmax': bounds[1],
            'colorbar': {'title': {'text': 'loss'}, 'len': 0.75, 'thickness': 16, **bar},
        },
        height=640 * rows,
        margin={'l': 10, 'r': 10, 't': 90, 'b': 10},
    )
    figure.update_annotations(font={'size': 14})
    _dress(figure)
    return figure, {name: _heights(landscapes, scale, name == 'log') for name in ('linear', 'log')}


def _heights(landscapes: Sequence[Landscape], scale: Scale, log: bool) -> View:
    """Return the heights of surfaces and points, and the axes that belong to them."""
    scale = Scale(scale.low, scale.high, log and scale.low > 0)
    low, high = (float(height) for height in scale.height([scale.low, scale.high]))
    heights = []
    for landscape in landscapes:
        heights += [scale.height(landscape.loss).tolist(), scale.height([m.loss for m in landscape.marks]).tolist()]
    rings = {'start': low, 'end': high, 'size': (high - low) / _RINGS}
    ticks = scale.round_losses(7)
    axis = {'tickvals': scale.height(ticks).tolist(), 'ticktext': [number(tick) for tick in ticks]}
    layout: dict[str, Any] = {}
    for scene in ('scene', *(f'scene{panel}' for panel in range(2, len(landscapes) + 1))):
        layout |= {f'{scene}.zaxis.{key}': value for key, value in axis.items()}
        layout[f'{scene}.zaxis.range'] = [low - 0.2 * (high - low), high + 0.03 * (high - low)]
    return {'z': heights, **{f'contours.z.{key}': value for key, value in rings.items()}}, layout


def _surface(landscape: Landscape, colors: Scale) -> go.Surface:
    """Return a plane as a surface, without heights; its colours are those of the pictures."""
    x, y = landscape.coordinates
    return go.Surface(
        x=x.tolist(),
        y=y.tolist(),
        text=np.array(_hover(landscape), dtype=object),  # from lists plotly would make one text per row
        hoverinfo='text',  # a template would take its text from [x][y]
        coloraxis='coloraxis',
        surfacecolor=colors.height(landscape.loss).tolist(),
        contours={
            'x': {'highlight': False},
            'y': {'highlight': False},
            'z': {'show': True, 'color': '#8b949e', 'width': 1, 'project': {'z': True}, 'highlightcolor': 'white'},
        },
    )


def _points(landscape: Landscape) -> go.Scatter3d:
    """Return the checkpoints as points."""
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


def _curves(landscapes: Sequence[Landscape], scale: Scale) -> tuple[go.Figure, dict[str, View]]:
    """Return the lines as curves in one pair of axes, and the views with a linear and a logarithmic axis."""
    del scale
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
    figure.update_layout(margin={'l': 70, 'r': 20, 't': 112, 'b': 60})
    figure.update_xaxes(title_text=_text(landscapes[0].axes[0]), gridcolor='#e5e7eb', zeroline=False)
    figure.update_yaxes(title_text='loss', gridcolor='#e5e7eb', zeroline=False)
    _dress(figure)
    return figure, {name: ({}, {'yaxis.type': name, 'yaxis.autorange': True}) for name in ('linear', 'log')}


def _dress(figure: go.Figure) -> None:
    """Set the fonts and colours of a figure."""
    figure.update_layout(
        font=_FONT,
        hoverlabel={'bgcolor': 'white', 'font': {'color': '#24292f'}},
        template='none',
    )


def _hover(landscape: Landscape) -> list[Any]:
    """Return the text that is shown at every point, nested like the losses."""
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
    """Return text as HTML, for plotly too, which reads some tags."""
    return html.escape(text, quote=False)


# Arranges the surfaces for the size of the window, turns all of them when one is turned, and shows the active view.
_SCRIPT = """
const div = document.getElementById('{plot_id}');
const scenes = Object.keys(div.layout).filter(key => key.startsWith('scene'));
let turning = false, shape = '';
const camera = JSON.parse(JSON.stringify((div.layout.scene || {}).camera || {}));
function arrange() {
  const count = scenes.length, width = div.clientWidth, narrow = width < 700;
  const left = window.innerHeight - div.getBoundingClientRect().top - window.scrollY - 16;
  if (!count) {
    const height = Math.max(400, Math.min(left, 1.3 * width));
    div.style.height = height + 'px';
    return Plotly.relayout(div, {height});
  }
  const columns = Math.max(1, Math.min(count, 3, Math.floor(width / 380))), rows = Math.ceil(count / columns);
  if (shape === [width, left, columns].join()) return;
  shape = [width, left, columns].join();
  const top = 100, bottom = narrow ? 80 : 8, bar = narrow ? 0 : 64, title = 56;
  const cell = (width - 20 - bar) / columns;
  const panel = rows === 1 ? Math.max(300, Math.min(left - top - bottom, 1.6 * cell)) : 0.95 * cell;
  const plot = rows * panel + (rows - 1) * title;
  div.style.height = plot + top + bottom + 'px';
  // A panel that is higher than wide is seen from further away, so that nothing is cut off, and is drawn higher.
  const tall = panel / cell, away = Math.max(0.95, (narrow ? 1.2 : 1.1) * tall), eye = camera.eye;
  const layout = JSON.parse(JSON.stringify(div.layout));
  layout.height = plot + top + bottom;
  layout.margin = {l: 10, r: 10 + bar, t: top, b: bottom};
  scenes.forEach((scene, index) => {
    const row = Math.floor(index / columns), column = index % columns;
    const high = 1 - row * (panel + title) / plot;
    const x = [column / columns, (column + 1) / columns], y = [Math.max(0, high - panel / plot), high];
    layout[scene].domain = {x, y};
    layout[scene].aspectratio = {x: 1, y: 1, z: 0.8 * Math.max(1, Math.min(1.5, tall))};
    layout[scene].camera = {...camera, eye: {x: away * eye.x, y: away * eye.y, z: away * eye.z}};
    Object.assign(layout.annotations[index], {x: (column + 0.5) / columns, y: high});
  });
  Object.assign(layout.coloraxis.colorbar, narrow
    ? {orientation: 'h', x: 0.5, xanchor: 'center', y: 0, yanchor: 'top', len: 0.9}
    : {orientation: 'v', x: 1.01, xanchor: 'left', y: 0.5, yanchor: 'middle', len: 0.75});
  const data = div.data;
  Plotly.purge(div);  // surfaces and a colour bar that are moved keep their old places
  return Plotly.newPlot(div, data, layout, CONFIG).then(listen);
}
function follow(change) {
  const turned = scenes.find(scene => change[scene + '.camera']);
  if (turning || !turned) return;
  turning = true;
  const cameras = {};
  for (const scene of scenes) if (scene !== turned) cameras[scene + '.camera'] = change[turned + '.camera'];
  Plotly.relayout(div, cameras).then(() => { turning = false; });
}
function listen() {
  if (scenes.length > 1) { div.on('plotly_relayouting', follow); div.on('plotly_relayout', follow); }
}
const menu = div.layout.updatemenus[0];
window.addEventListener('resize', arrange);
return Plotly.update(div, ...menu.buttons[menu.active].args).then(arrange);
"""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval' blob:;
 style-src 'unsafe-inline'; img-src data: blob:; font-src data:; worker-src blob:; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; color: #24292f; margin: 24px 32px; }
h1 { font-size: 22px; font-weight: 600; margin: 0 0 4px; }
p { margin: 0; color: #57606a; font-size: 13px; }
@media (max-width: 700px) { body { margin: 12px; } h1 { font-size: 18px; } }
</style>
</head>
<body>
<h1>$title</h1>
$notes
$figure
</body>
</html>
""")

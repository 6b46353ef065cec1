"""The tables and pictures of the commands ``landscape`` and ``sharpness``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from composer_sam.extras import extra
from composer_sam.files import write_whole
from composer_sam.landscapes.page import page
from composer_sam.landscapes.pictures import contours, curves, number, png, surfaces
from composer_sam.landscapes.storage import Landscape
from composer_sam.studies.landscape import Request, enumerated
from composer_sam.studies.sharpness import CheckpointMeasurements

with extra('composer', __name__):
    from rich.table import Table

__all__ = ['tabulate_landscapes', 'tabulate_measurements', 'write_pictures']

_DIRECTIONS = {
    'random': 'random filter-normalised directions (seed {seed})',
    'hessian': 'along the eigenvectors of the Hessian with the largest eigenvalues',
    'checkpoints': 'on the {through} through them',
}


def write_pictures(landscapes: Sequence[Landscape], request: Request, folder: Path) -> list[Path]:
    """Write the pictures of the landscapes and the interactive page to ``folder``, and return the files."""
    title = f'Loss {"between" if request.directions == "checkpoints" else "around"} {enumerated(request.labels)}'
    kind, wrong = _kind(landscapes[0].about)
    labels = f', {100 * wrong:g} % of whose labels are wrong; loss and accuracy count these labels as right'
    landscapes = [replace(one, about={**one.about, 'wrong_labels': wrong}) for one in landscapes]
    notes = [
        *_finding(landscapes),
        _DIRECTIONS[request.directions].format(seed=request.seed, through=('line', 'plane')[request.dims - 1]),
        f'{landscapes[0].about["samples"]} {kind} samples{labels if wrong else ""}',
    ]
    caption = '\n'.join([title, *notes])
    drawn = {'curve.png': curves} if request.dims == 1 else {'landscape.png': contours, 'surface.png': surfaces}
    for name, draw in drawn.items():
        write_whole(folder / name, png(draw(landscapes, caption)))
    write_whole(folder / 'landscape.html', page(landscapes, title, notes))
    return [folder / name for name in (*drawn, 'landscape.html')]


def _finding(landscapes: Sequence[Landscape]) -> list[str]:
    """Return what landscapes around one checkpoint each show, beside each other."""
    if len(landscapes) < 2:
        return []
    highest = [float(np.nan_to_num(one.loss, nan=np.inf).max()) for one in landscapes]
    grown = [
        f'{number(high - one.marks[0].loss)} around {one.label}' for high, one in zip(highest, landscapes, strict=True)
    ]
    return [f'The loss grows by up to {"; ".join(grown)}']


def tabulate_landscapes(landscapes: Sequence[Landscape]) -> Table:
    """Return a table with a row per checkpoint: its loss and accuracy, and the losses around it."""
    table = _table('checkpoint', '  loss', '  accuracy', '  lowest loss', '  mean', '  highest', '  not finite')
    for landscape in landscapes:
        finite = landscape.loss[np.isfinite(landscape.loss)]
        around = [f'{value:.4g}' for value in (finite.min(), finite.mean(), finite.max())] if finite.size else ['-'] * 3
        gaps = f'{landscape.loss.size - finite.size} of {landscape.loss.size}'
        for mark in landscape.marks:
            accuracy = '-' if mark.accuracy is None else f'{100 * mark.accuracy:.1f} %'
            table.add_row(mark.label, f'{mark.loss:.4g}', accuracy, *around, gaps)
            around, gaps = [''] * 3, ''  # in the first row only of checkpoints that share a landscape
    return table


def tabulate_measurements(rows: Sequence[CheckpointMeasurements]) -> Table:
    """Return a table with a row per checkpoint and a column per measure."""
    places = max([1, *(len(row.measurements.eigenvalues or ()) for row in rows)])
    headings = [f'λ{place}' for place in range(1, places + 1)]
    table = _table('checkpoint', 'loss', 'accuracy', *headings, 'trace', 'sharpness', 'adaptive', 'flatness')
    for row in rows:
        found = row.measurements
        eigenvalues = [*(found.eigenvalues or ()), *[None] * places][:places]
        table.add_row(
            row.label,
            _text(found.loss, '.4g'),
            '-' if row.accuracy is None else f'{100 * row.accuracy:.1f} %',
            *(_text(value, '.4g') for value in eigenvalues),
            f'{_text(found.trace, ".4g")} ± {_text(found.trace_stderr, ".2g")}',
            *(
                _text(value, '.3g')
                for value in (found.sam_sharpness, found.adaptive_sharpness, found.first_order_flatness)
            ),
        )
    return table


def _kind(about: Mapping[str, Any]) -> tuple[str, float]:
    """Return what samples the losses of a landscape are measured on, and the fraction of their labels that is wrong."""
    held_out = about['data']['validation_fraction'] and not about.get('early_stopping')
    kind = 'training' if about['split'] == 'train' else 'validation' if held_out else 'test'
    return kind, about['data']['label_noise'] if kind != 'test' else 0.0


def _text(value: float | None, form: str) -> str:
    return '-' if value is None else format(value, form)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column(first, overflow='fold')
    for heading in others:
        table.add_column(heading, justify='right', no_wrap=True)
    return table

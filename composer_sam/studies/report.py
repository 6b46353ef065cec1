"""What the commands ``landscape`` and ``sharpness`` print and write: tables, pictures and a bar of progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from composer_sam.landscapes import pictures
from composer_sam.landscapes.page import page
from composer_sam.landscapes.storage import Landscape
from composer_sam.studies.checkpoints import Request, listed

__all__ = ['console', 'progress_bar', 'tabulate_landscapes', 'tabulate_measurements', 'write_pictures']

_DPI = 150
_WIDTH = 200
_DIRECTIONS = {
    'random': 'random filter-normalised directions (seed {seed})',
    'hessian': 'along the eigenvectors of the Hessian with the largest eigenvalues',
    'checkpoints': 'on the {through} through them',
}


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, and the function that moves it: called with a label, how much is done and of how much."""
    bar = Progress(
        TextColumn('{task.description}'),
        BarColumn(None),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with bar:
        tasks: dict[str, Any] = {}

        def move(label: str, done: int, of: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label)
            bar.update(tasks[label], completed=done, total=of)

        yield move


def console() -> Console:
    """For tables on stdout; in a file they are not cut at the width of a terminal there is none of."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _WIDTH)


def write_pictures(landscapes: Sequence[Landscape], request: Request, folder: Path) -> list[Path]:
    """Draws the landscapes into ``folder`` and returns the files."""
    title = f'Loss {"between" if request.directions == "checkpoints" else "around"} {listed(request.labels)}'
    samples = landscapes[0].about['samples']
    notes = [
        _DIRECTIONS[request.directions].format(seed=request.seed, through=('line', 'plane')[request.dims - 1]),
        f'{samples} {"training" if request.split == "train" else "test"} samples',
    ]
    caption = f'{title}\n{", ".join(notes)}'
    drawn: dict[str, Any] = {'curve.png': pictures.curves}
    if request.dims == 2:
        drawn = {'landscape.png': pictures.contours, 'surface.png': pictures.surfaces}
    for name, draw in drawn.items():
        draw(landscapes, caption).savefig(folder / name, dpi=_DPI)
    (folder / 'landscape.html').write_text(page(landscapes, title, notes), encoding='utf-8')
    return [folder / name for name in (*drawn, 'landscape.html')]


def tabulate_landscapes(landscapes: Sequence[Landscape]) -> Table:
    """One row per checkpoint: its loss and accuracy, and the losses around it."""
    table = _table('checkpoint', '  loss', '  accuracy', '  lowest loss', '  mean', '  highest', '  not finite')
    for landscape in landscapes:
        finite = landscape.loss[np.isfinite(landscape.loss)]
        around = [f'{value:.4g}' for value in (finite.min(), finite.mean(), finite.max())] if finite.size else ['-'] * 3
        gaps = f'{landscape.loss.size - finite.size} of {landscape.loss.size}'
        for mark in landscape.marks:
            accuracy = '-' if mark.accuracy is None else f'{100 * mark.accuracy:.1f} %'
            table.add_row(mark.label, f'{mark.loss:.4g}', accuracy, *around, gaps)
            around, gaps = [''] * 3, ''  # several in one landscape have it in common
    return table


def tabulate_measurements(rows: Sequence[dict[str, Any]]) -> Table:
    """One row per checkpoint, one column per measure."""
    eigenvalues = sorted({name for row in rows for name in row if name.startswith('eigenvalue_')}, key=_place)
    headings = [f'λ{place}' for place in range(1, len(eigenvalues) + 2)]
    table = _table('checkpoint', 'loss', 'accuracy', *headings, 'trace', 'sharpness', 'adaptive', 'flatness')
    for row in rows:
        measures = ['top_eigenvalue', *eigenvalues]
        table.add_row(
            row['label'],
            f'{row["loss"]:.4g}',
            f'{100 * row["accuracy"]:.1f} %' if 'accuracy' in row else '-',
            *(f'{row[name]:.4g}' if name in row else '-' for name in measures),
            f'{row["trace"]:.4g} ± {row["trace_stderr"]:.2g}',
            *(f'{row[name]:.3g}' for name in ('sam_sharpness', 'adaptive_sharpness', 'first_order_flatness')),
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify='right', no_wrap=True)
    return table


def _place(name: str) -> int:
    return int(name.rsplit('_', 1)[1])

"""The command that draws a picture of a report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.report import RESULTS
from composer_sam.files import write_whole
from composer_sam.landscapes.pictures import png

__all__ = ['save', 'write_picture']


def write_picture(doc: str | None, report: str, draw: Callable[[dict[str, Any]], Figure], picture: Path) -> None:
    """Read the command line, draw a report and write the picture.

    Args:
        doc: what the command does.
        report: the name of the report.
        draw: draws its content.
        picture: where the picture is written unless the command line says otherwise.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--report', type=Path, default=RESULTS / f'{report}.json')
    parser.add_argument('--out', type=Path, default=picture)
    options = parser.parse_args()
    save(draw(json.loads(options.report.read_text())), options.out)


def save(figure: Figure, picture: Path) -> None:
    """Write a picture, and say where it is."""
    write_whole(picture, png(figure, dpi=130))
    print(f'written to {picture}')

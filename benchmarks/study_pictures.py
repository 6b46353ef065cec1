"""Draw the two studies of docs/study.md, from their reports.

python -m benchmarks.study_pictures

The reports have no curves by epoch, so that the pictures have no panel of the share of larger entries.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.picture import save
from benchmarks.report import RESULTS
from composer_sam.studies.drawing import draw
from composer_sam.studies.result import RunResult

__all__ = ['STUDIES', 'runs_of']

STUDIES = ('digits', 'cifar10')
DOCS = Path(__file__).resolve().parents[1] / 'docs'


def runs_of(study: str) -> list[RunResult]:
    """Return the runs of a report."""
    report = json.loads((RESULTS / f'study_{study}.json').read_text())
    rest: dict[str, Any] = {'train': {}, 'test': {}, 'geometry': None}
    return [RunResult.from_json({**run, **rest, 'config': report['configs'][run['recipe']]}) for run in report['runs']]


def main() -> None:
    for study in STUDIES:
        save(draw(runs_of(study)), DOCS / f'study-{study}.png')


if __name__ == '__main__':
    main()

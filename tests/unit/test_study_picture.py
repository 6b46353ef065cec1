"""The picture of a study: its bars are the seeds', and its title says what the data is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from benchmarks.study_pictures import runs_of
from composer_sam.studies.drawing import draw


def bars(figure: Figure, panel: int, axis: int) -> list[tuple[float, float]]:
    """Return the ends of all bars of a panel, along ``axis``."""
    found = []
    for container in figure.axes[panel].containers:
        assert isinstance(container, ErrorbarContainer)
        for lines in container.lines[2]:
            assert isinstance(lines, LineCollection)
            found += [tuple(np.asarray(segment)[:, axis]) for segment in lines.get_segments()]
    return found


def test_bars_reach_from_the_lowest_to_the_highest_seed() -> None:
    """The standard deviation of accuracies reached beyond 100 %, and that of eigenvalues below 0."""
    found = runs_of('digits')
    figure = draw(found)
    accuracies = {100 * run.accuracy for run in found if run.accuracy is not None}
    ends = np.array(bars(figure, 0, 1))
    assert len(ends) == 30  # six methods at five radii
    assert all(min(abs(end - one) for one in accuracies) < 1e-6 for end in ends.flat)
    assert ends.max() <= 100
    assert np.array(bars(figure, 1, 1)).min() > 0


@pytest.mark.parametrize(
    ('study', 'found', 'data'),
    [
        ('digits', 'Most accurate is SAM at rho 0.5. Test accuracy (%): 96.96', 'digits, 40 %'),
        (
            'cifar10',
            'Most accurate is SAMDirection, norms. Test accuracy (%): 38.83 ± 1.88; Largest Hessian',
            'image_folder, 20 %',
        ),
    ],
)
def test_the_title_says_what_was_found_and_what_is_drawn(study: str, found: str, data: str, tmp_path: Path) -> None:
    figure = draw(runs_of(study))
    said, *rest = figure.texts[0].get_text().splitlines()
    assert said.startswith(found)
    assert rest == [
        f'{data} of the training labels are wrong',
        'mean over 3 seeds; bars and bands: lowest to highest seed',
    ]
    figure.savefig(tmp_path / 'study.png', dpi=60)

"""Captions of landscapes say which labels are wrong, and on which samples loss and accuracy are measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer_sam.landscapes.storage import Landscape
from composer_sam.landscapes.subspaces import Mark
from composer_sam.studies.landscape import Request, enumerated
from composer_sam.studies.report import write_pictures

WRONG = '40 % of whose labels are wrong; loss and accuracy count these labels as right'


@pytest.mark.parametrize(
    ('split', 'data', 'more', 'caption', 'accuracy'),
    [
        ('train', {'label_noise': 0.4}, {}, f'512 training samples, {WRONG}', 'accuracy on noisy labels 75.0 %'),
        ('train', {}, {}, '512 training samples<', ', accuracy 75.0 %'),
        ('test', {'label_noise': 0.4}, {}, '512 test samples<', ', accuracy 75.0 %'),
        (
            *('test', {'label_noise': 0.4, 'validation_fraction': 0.1}, {}),
            *(f'512 validation samples, {WRONG}', 'accuracy on noisy labels 75.0 %'),
        ),
        (
            *('test', {'label_noise': 0.4, 'validation_fraction': 0.1}, {'early_stopping': True}),
            *('512 test samples<', ', accuracy 75.0 %'),
        ),
    ],
)
def test_the_page_says_which_labels_are_wrong(
    split: Any, data: dict[str, float], more: dict[str, bool], caption: str, accuracy: str, tmp_path: Path
) -> None:
    axis = np.linspace(-1, 1, 3)
    about = {'samples': 512, 'split': split, 'data': {'label_noise': 0.0, 'validation_fraction': 0.0} | data, **more}
    loss = 1 + axis[None, :] ** 2 + axis[:, None] ** 2
    landscape = Landscape('SGD', ('u', 'v'), (axis, axis), loss, None, (Mark('SGD', (0.0, 0.0), 1.0, 0.75),), about)
    write_pictures([landscape], Request((tmp_path / 'x.pt',), ('SGD',), split=split), tmp_path)
    page = (tmp_path / 'landscape.html').read_text(encoding='utf-8')
    assert caption in page and accuracy in page
    assert 'CONFIG' not in page.rpartition('function arrange()')[2]


def test_names_with_commas_are_kept_apart() -> None:
    assert enumerated(['SGD', 'ASAM', 'SAM']) == 'SGD, ASAM and SAM'
    assert enumerated(['SGD', 'SGD, stopped early', 'SAM']) == 'SGD; SGD, stopped early; SAM'


def test_the_caption_says_how_much_the_loss_grows(tmp_path: Path) -> None:
    axis = np.linspace(-1, 1, 3)
    loss = 1 + axis[None, :] ** 2 + axis[:, None] ** 2
    about = {'samples': 512, 'split': 'train', 'data': {'label_noise': 0.0, 'validation_fraction': 0.0}}

    def around(name: str, loss: np.ndarray) -> Landscape:
        mark = Mark(name, (0.0, 0.0), float(loss[1, 1]), None)
        return Landscape(name, ('u', 'v'), (axis, axis), loss, None, (mark,), about)

    gap = loss.copy()
    gap[0, 0] = np.nan
    found = [around('SGD', 3 * loss), around('ASAM, late', loss), around('SAM', gap)]
    write_pictures(found, Request((tmp_path / 'x.pt',) * 3, tuple(one.label for one in found)), tmp_path)
    page = (tmp_path / 'landscape.html').read_text(encoding='utf-8')
    assert 'The loss grows by up to 6 around SGD; 2 around ASAM, late; inf around SAM' in page

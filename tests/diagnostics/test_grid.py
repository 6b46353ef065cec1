"""Grids of losses: resuming after a kill, processes, gaps, and the file they are stored in."""

from __future__ import annotations

import copy
import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_network import Counted, around, axes, cross_entropy, data, network

from composer_sam.landscapes.grid import evaluate, measuring
from composer_sam.landscapes.storage import Landscape, LandscapeError


@pytest.mark.parametrize('dims', [1, 2])
def test_a_grid_goes_on_after_a_kill_and_computes_no_row_twice(tmp_path: Path, dims: int) -> None:
    model, batches = network(), data()
    undisturbed = evaluate(around(model, dims), model, cross_entropy, batches, axes(5, dims))
    path = tmp_path / 'grid.npz'
    per_row, rows_done = (5 if dims == 2 else 1), 3
    # Two batches a point; the mark comes first. The failure falls into the fourth row.
    failing = Counted(fail_at=2 * (1 + rows_done * per_row) + 1)
    with pytest.raises(RuntimeError, match='injected'):
        evaluate(around(model, dims), model, failing, batches, axes(5, dims), path=path)
    with pytest.raises(LandscapeError, match='only 3 of 5 rows have been evaluated'):
        Landscape.load(path)
    going_on, seen = Counted(), []
    again = evaluate(
        around(model, dims), model, going_on, batches, axes(5, dims), path=path, progress=lambda *at: seen.append(at)
    )
    assert going_on.calls == 2 * (1 + 2 * per_row)
    assert seen == [(3, 5), (4, 5), (5, 5)]
    assert np.array_equal(again.loss, undisturbed.loss)
    assert again.accuracy is not None and undisturbed.accuracy is not None
    assert np.array_equal(again.accuracy, undisturbed.accuracy)
    finished = Counted()
    evaluate(around(model, dims), model, finished, batches, axes(5, dims), path=path)
    assert finished.calls == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('changed', ['weights', 'coordinates', 'samples', 'seed', 'about'])
def test_another_landscape_is_not_gone_on_with(tmp_path: Path, changed: str) -> None:
    path = tmp_path / 'grid.npz'
    model, batches = network(), data()
    evaluate(around(model), model, cross_entropy, batches, axes(3), path=path, about={'resolution': 3})
    content = path.read_bytes()
    other = network(1) if changed == 'weights' else model
    message = r'holds a landscape with another fingerprint \(.*\); choose another folder or delete that file'
    with pytest.raises(LandscapeError, match='another resolution \\(3, now 4\\)' if changed == 'about' else message):
        evaluate(
            around(other, seed=1 if changed == 'seed' else 0),
            model,
            cross_entropy,
            data(8) if changed == 'samples' else batches,
            axes(3, reach=2 if changed == 'coordinates' else 1),
            path=path,
            about={'resolution': 4 if changed == 'about' else 3},
        )
    assert path.read_bytes() == content


def test_two_processes_compute_the_same_bits(tmp_path: Path) -> None:
    model, batches = network(), data()
    loaded = pickle.loads(pickle.dumps(model))
    one = evaluate(around(model), model, cross_entropy, batches, axes(4), jobs=1)
    two = evaluate(around(model), model, cross_entropy, batches, axes(4), jobs=2, path=tmp_path / 'two.npz')
    assert np.array_equal(one.loss, two.loss)
    assert one.accuracy is not None and two.accuracy is not None
    assert np.array_equal(one.accuracy, two.accuracy)
    assert not any(parameter.is_shared() for parameter in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))


def test_an_error_in_a_process_is_raised_and_ends_the_others() -> None:
    model = network()
    with pytest.raises(RuntimeError, match='injected'):
        evaluate(around(model), model, Counted(fail_at=9), data(), axes(4), jobs=2)


def test_a_process_that_is_killed_is_an_error_and_not_a_wait() -> None:
    model = network()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match='a process ended without a result'):
        evaluate(around(model), model, Counted(fail_at=9, leave=True), data(), axes(4), jobs=2)
    assert time.monotonic() - start < 60


def test_processes_are_started_once_one_turns_out_to_need_long(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, here = network(), data(), Counted()
    spread: list[Any] = []

    def in_no_process(task: Any, rows: list[int], jobs: int) -> Iterator[tuple[int, np.ndarray]]:
        spread.append((rows, jobs))
        with task.measuring() as measure:
            yield from [(index, task.row(index, measure)) for index in rows]

    monkeypatch.setattr('composer_sam.landscapes.grid._by_processes', in_no_process)
    monkeypatch.setattr('composer_sam.landscapes.grid._cores', lambda: 2)
    quick = evaluate(around(model), model, here, batches, axes(4))
    assert spread == []
    monkeypatch.setattr('composer_sam.landscapes.grid._PROCESSES_FROM', 0.0)
    slow = evaluate(around(model), model, here, batches, axes(4))
    assert spread == [([1, 2, 3], 2)]
    assert np.array_equal(quick.loss, slow.loss)
    monkeypatch.setattr('composer_sam.landscapes.grid._cores', lambda: 1)
    evaluate(around(model), model, here, batches, axes(4))
    evaluate(around(model), model, here, batches, axes(4), jobs=1)
    assert len(spread) == 1


def test_losses_that_are_not_finite_are_kept() -> None:
    model, batches = network(), data()
    landscape = evaluate(around(model), model, cross_entropy, batches, [np.array([0.0, 1e30]), np.array([0.0, 1e38])])
    assert np.isfinite(landscape.loss[0, 0])
    assert not np.isfinite(landscape.loss[1, 1])


def test_a_composer_model_is_measured_by_its_own_loss() -> None:
    pytest.importorskip('composer')
    from composer.models import ComposerClassifier

    model, batches = network(), data()
    wrapped = ComposerClassifier(copy.deepcopy(model), num_classes=5)
    plain = evaluate(around(model), model, cross_entropy, batches, axes(3))
    own = evaluate(around(wrapped), wrapped, None, batches, axes(3))
    assert np.array_equal(own.loss, plain.loss)
    assert own.accuracy is not None and plain.accuracy is not None
    assert np.array_equal(own.accuracy, plain.accuracy)
    assert not wrapped._forward_hooks


def test_measuring_leaves_nothing_behind_after_an_error() -> None:
    model, batches = network(), data()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match='injected'), measuring(model, Counted(fail_at=3), batches) as measure:
        measure({})
        measure({'1.running_var': torch.ones(3), '5.bias': torch.full((5,), torch.nan)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_saved_is_what_is_loaded_and_is_no_pickle(tmp_path: Path) -> None:
    model = network()
    found = evaluate(around(model, 1), model, cross_entropy, data(), axes(3, 1), label='ä b', about={'seed': 0})
    path = tmp_path / 'x.npz'
    found.save(path)
    loaded = Landscape.load(path)
    assert (loaded.label, loaded.axes, loaded.marks, loaded.about) == (
        found.label,
        found.axes,
        found.marks,
        found.about,
    )
    assert np.array_equal(loaded.loss, found.loss)
    assert loaded.accuracy is not None and found.accuracy is not None
    assert np.array_equal(loaded.accuracy, found.accuracy)
    assert np.array_equal(loaded.coordinates[0], found.coordinates[0])
    with np.load(path, allow_pickle=False) as stored:
        assert json.loads(str(stored['description']))['label'] == 'ä b'


@pytest.mark.parametrize('content', [b'', b'not an archive', pickle.dumps({'loss': 1})])
def test_a_file_that_is_no_landscape_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / 'x.npz'
    path.write_bytes(content)
    with pytest.raises(LandscapeError, match='not a stored landscape'):
        Landscape.load(path)
    np.savez(path, loss=np.zeros(3))
    with pytest.raises(LandscapeError, match='not a stored landscape'):
        Landscape.load(path)
    with pytest.raises(LandscapeError, match='does not exist'):
        Landscape.load(tmp_path / 'y.npz')


def test_a_grid_of_no_points_or_too_few_axes_is_refused() -> None:
    model = network()
    with pytest.raises(LandscapeError, match='a grid of 3 x 0 points'):
        evaluate(around(model), model, cross_entropy, data(), [np.arange(3.0), np.array([])])
    with pytest.raises(LandscapeError, match='a grid of 3 points cannot be laid over 2 axes'):
        evaluate(around(model), model, cross_entropy, data(), [np.arange(3.0)])
    with pytest.raises(ValueError, match='at least one sample'):
        evaluate(around(model), model, cross_entropy, [], axes(3))

"""Comparisons: recipes with overlays, gone on with where they were cut off, and never mixed with another's runs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from background import started

from composer_sam.commands.main import main
from composer_sam.recipes import RecipeError, build_trainer, load_recipe

REPOSITORY = Path(__file__).parents[2]
YAMLS = REPOSITORY / 'yamls'
SGD, SAM = (str(YAMLS / 'digits' / f'{name}.yaml') for name in ('sgd', 'sam'))
GAM = f'{SGD}+{YAMLS}/methods/gam.yaml'
QUICK = ['max_duration=2ep', '--jobs', '2']


def compare(*arguments: str, out: Path) -> None:
    assert main(['compare', *arguments, '--out', str(out)]) == 0


def results(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / 'results.json').read_text())['runs']


def written(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / 'runs').iterdir()}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, out: Path) -> str:
    capsys.readouterr()
    assert main(['compare', *arguments, '--out', str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ''
    return captured.err.splitlines()[-1]


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SGD and GAM, which is SGD with an overlay."""
    out = tmp_path_factory.mktemp('comparison')
    compare(SGD, GAM, '--seeds', '2', *QUICK, out=out)
    return out


def test_an_overlay_is_compared_without_a_file_of_its_own(finished: Path) -> None:
    found = [(run['recipe'], run['seed']) for run in results(finished)]
    assert found == [(name, seed) for seed in (17, 18) for name in ('SGD', 'GAM')]
    assert sorted(written(finished)) == sorted(f'{name}-seed{seed}.json' for name, seed in found)


def test_a_finished_comparison_says_that_nothing_was_left(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, numbers = written(finished), results(finished)
    compare(SGD, GAM, '--seeds', '2', *QUICK, out=finished)
    captured = capsys.readouterr()
    assert 'nothing was left to train: all 4 runs are done' in captured.err
    assert 'SGD' in captured.out and 'GAM' in captured.out
    assert (written(finished), results(finished)) == (before, numbers)


def test_only_what_is_missing_is_trained(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, numbers = written(finished), results(finished)
    (finished / 'runs' / 'GAM-seed18.json').unlink()
    compare(SGD, GAM, '--seeds', '2', *QUICK, out=finished)
    assert '3 of 4 runs are done' in capsys.readouterr().err
    after = written(finished)
    assert [name for name in before if before[name] != after[name]] == ['GAM-seed18.json']
    for was, now in zip(numbers, results(finished), strict=True):
        assert {**was, 'seconds_per_step': 0} == {**now, 'seconds_per_step': 0}


def test_runs_of_another_comparison_are_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = written(finished), (finished / 'results.json').read_text()
    line = refused(capsys, SGD, SAM, *QUICK, 'optimizer.lr=0.2', out=finished)
    assert 'runs/SGD-seed17.json is of a run with optimizer.lr=0.1, and 0.2 is asked for; choose another --out' in line
    assert 'sharpness=None, and nothing' in refused(capsys, SGD, *QUICK, '--sharpness', out=finished)
    assert (written(finished), (finished / 'results.json').read_text()) == before


def test_a_network_that_is_not_there_is_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [SGD, 'max_duration=2ba', 'eval_interval=0']
    compare(*arguments, out=tmp_path)
    compare(*arguments, '--landscape', out=tmp_path)
    assert 'nothing was left' not in capsys.readouterr().err
    network = tmp_path / 'landscape' / 'SGD-seed17.pt'
    before = network.stat().st_mtime_ns
    compare(*arguments, '--landscape', out=tmp_path)
    assert 'nothing was left to train: the run is done' in capsys.readouterr().err
    assert network.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (['data.name=image_folder', 'data.root=nowhere'], "data.root: 'nowhere' is no directory"),
        (['optimizer.lr=abc'], "optimizer.lr: must be a number, got 'abc'"),
        (['algorithms.mixup.alpha=-1'], "algorithms.mixup: 'alpha >= 0' does not hold (given alpha=-1)"),
    ],
)
@pytest.mark.parametrize('command', ['compare', 'study'])
def test_a_mistake_leaves_nothing_behind(
    tmp_path: Path, command: str, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'deep' / 'out'
    assert main([command, SGD, *changes, *QUICK, '--out', str(out)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_comparison_goes_on(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    arguments = ['compare', SGD, GAM, 'max_duration=30ep', 'eval_interval=0', '--jobs', '2', '--out', str(out)]
    process = started(arguments, out, 'runs/SGD-seed17.json')
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    before = written(out)
    assert list(before) == ['SGD-seed17.json']
    assert main(arguments) == 0
    assert written(out)['SGD-seed17.json'] == before['SGD-seed17.json']
    assert [run['recipe'] for run in results(out)] == ['SGD', 'GAM']


def test_a_run_with_checkpoints_is_resumed_from_them(tmp_path: Path) -> None:
    arguments = [SGD, 'max_duration=4ep', 'save_interval=1ep']
    compare(*arguments, out=tmp_path / 'undisturbed')
    saving = f'save_folder={tmp_path}/saved'
    compare(*arguments, saving, out=tmp_path / 'first')
    folder = tmp_path / 'saved' / 'SGD-seed17'
    for name in ('ep4-ba84-rank0.pt', 'ep3-ba63-rank0.pt', 'latest-rank0.pt'):
        (folder / name).unlink()
    (folder / 'latest-rank0.pt').symlink_to('ep2-ba42-rank0.pt')
    compare(*arguments, saving, out=tmp_path / 'again')
    (expected,), (resumed,) = (results(tmp_path / name) for name in ('undisturbed', 'again'))
    for key in ('accuracy', 'loss', 'steps', 'train', 'test'):
        assert resumed[key] == expected[key]


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (['algorithms.mixup.alpha=-1'], r"^algorithms\.mixup: 'alpha >= 0' does not hold \(given alpha=-1\)$"),
        (
            ['callbacks.speed_monitor.window_size=-1'],
            r'^callbacks\.speed_monitor: IndexError: .* \(given window_size=-1\)',
        ),
        (['algorithms.sam={}', 'algorithms.cutmix.alpha=-1'], r'^algorithms\.cutmix: '),
    ],
)
def test_an_argument_that_is_refused_at_first_use_is_one_line(overrides: list[str], message: str) -> None:
    recipe = load_recipe(SGD, overrides=['max_duration=2ba', *overrides])
    with pytest.raises(RecipeError, match=message) as caught:
        trainer = build_trainer(recipe)
        try:
            trainer.fit()
        finally:
            trainer.close()
    assert '\n' not in str(caught.value)


def test_an_error_in_the_network_is_not_blamed_on_a_component(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer(load_recipe(SAM, overrides=['max_duration=2ba', 'algorithms.label_smoothing={}']))

    def fail(*_: Any) -> None:
        raise ValueError('of the network')

    monkeypatch.setattr(trainer.state.model.module, 'forward', fail)
    with pytest.raises(ValueError, match='^of the network$') as caught:
        trainer.fit()
    assert not isinstance(caught.value, RecipeError)
    trainer.close()

"""One run, one folder: its checkpoints, its recipe and its event files; and going on from there."""

from __future__ import annotations

from pathlib import Path

import pytest

from composer_sam.commands.main import main
from composer_sam.recipes import load_recipe

REPOSITORY = Path(__file__).parents[2]
SGD, SAM = (str(REPOSITORY / 'yamls' / 'digits' / f'{name}.yaml') for name in ('sgd', 'sam'))
LOGGED = ['loggers.tensorboard={}', 'model.hidden=[12]']


def test_a_run_is_one_folder_with_one_event_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    monkeypatch.chdir(tmp_path)
    for name, recipe in (('sgd', SGD), ('sam', SAM)):
        assert main(['train', recipe, *LOGGED, 'max_duration=6ep', f'save_folder=runs/{name}']) == 0
    assert [path.name for path in tmp_path.iterdir()] == ['runs']
    for name in ('sgd', 'sam'):
        files = sorted(path.name.split('.')[0] for path in (tmp_path / 'runs' / name).rglob('*'))
        assert files == ['config', 'ep6-ba126-rank0', 'events', 'latest-rank0']
        found = accumulator.EventAccumulator(str(tmp_path / 'runs' / name)).Reload()
        assert len(found.Scalars('loss/train/total')) == 126
        assert [event.step for event in found.Scalars('metrics/eval/MulticlassAccuracy')] == [
            21 * n for n in range(1, 7)
        ]
        assert found.PluginTagToContent('hparams')


def test_a_study_keeps_its_event_files(tmp_path: Path) -> None:
    pytest.importorskip('tensorboard')
    assert main(['study', SGD, *LOGGED, 'max_duration=1ep', '--no-sharpness', '--out', str(tmp_path)]) == 0
    (file,) = [path for path in (tmp_path / 'checkpoints').rglob('*') if path.is_file()]
    assert file.name.startswith('events.out.tfevents')
    assert file.parent.parent.name == 'checkpoints'


def test_a_resumed_run_says_from_where_and_counts_all_steps(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = ['train', SGD, f'save_folder={tmp_path}', 'autoresume=true', 'save_interval=1ep']
    assert main([*run, 'max_duration=3ep']) == 0
    first = capfd.readouterr()
    assert 'resumed' not in first.err
    assert ' after 63 steps of ' in first.out
    assert main([*run, 'max_duration=6ep']) == 0
    second = capfd.readouterr()
    assert f'resumed from {tmp_path}/ep3-ba63-rank0.pt at step 63\n' in second.err
    assert ' after 126 steps (63 of them in this call) of ' in second.out
    assert main([*run, 'max_duration=6ep']) == 0
    third = capfd.readouterr()
    assert f'resumed from {tmp_path}/ep6-ba126-rank0.pt at step 126\n' in third.err
    assert third.out.endswith(' after 126 steps; nothing was left to do\n')


def test_checkpoints_are_measured_with_the_recipe_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['train', SGD, 'model.hidden=[12]', 'max_duration=1ep', f'save_folder={tmp_path}/run']) == 0
    checkpoint, alone = tmp_path / 'run' / 'ep1-ba21-rank0.pt', tmp_path / 'alone.pt'
    alone.write_bytes(checkpoint.read_bytes())
    quick = ['--samples', '32']
    capsys.readouterr()
    assert main(['sharpness', str(checkpoint), *quick]) == 0
    by_default = capsys.readouterr().out
    assert main(['sharpness', str(checkpoint), *quick, '--recipe', SGD, 'model.hidden=[12]']) == 0
    assert capsys.readouterr().out == by_default
    out = str(tmp_path / 'landscape')
    assert main(['landscape', str(checkpoint), *quick, '--dims', '1', '--resolution', '3', '--out', out]) == 0
    capsys.readouterr()
    assert main(['sharpness', str(alone), *quick]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'composer-sam: --recipe: there is no {tmp_path}/config.yaml beside the checkpoint; ')


def test_a_dry_run_prints_what_would_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ['algorithms.sam.rho=0.2', f'save_folder={tmp_path}/run']
    assert main(['train', SAM, *overrides, '--dry-run']) == 0
    printed = capsys.readouterr().out
    file = tmp_path / 'resolved.yaml'
    file.write_text(printed)
    assert load_recipe(file) == load_recipe(SAM, overrides=overrides)
    assert not (tmp_path / 'run').exists()
    assert main(['train', SAM, 'algorithms.sam.rho=-1', '--dry-run']) == 2
    assert 'rho must be' in capsys.readouterr().err

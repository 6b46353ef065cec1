"""Two commands do not write into one folder at the same time: the second is one line, before it trains anything."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from background import started
from torch import nn

from composer_sam.commands.main import main
from composer_sam.recipes import RecipeError, load_recipe
from composer_sam.recipes.save_folder import hold_folder
from tests.holder import another_process

REPOSITORY = Path(__file__).parents[2]
SGD = str(REPOSITORY / 'yamls' / 'digits' / 'sgd.yaml')
QUICK = ['max_duration=2ba', 'eval_interval=0', 'model.hidden=[4]', 'name=SGD', '--jobs', '1']


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ''
    return captured.err.splitlines()[-1]


@pytest.mark.parametrize('command', ['compare', 'study', 'landscape'])
def test_a_folder_of_results_has_one_writer(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / 'out'
    weights = tmp_path / 'weights.pt'
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))
    torch.save(model.state_dict(), weights)
    command_line = {
        'compare': ['compare', SGD, *QUICK],
        'study': ['study', SGD, *QUICK, '--no-sharpness'],
        'landscape': ['landscape', str(weights), '--recipe', SGD, 'model.hidden=[4]', '--resolution', '2'],
    }[command]
    with another_process(out) as process:
        before = sorted(path.name for path in out.iterdir())
        monkeypatch.setattr('composer_sam.studies.kept.train_all', lambda *_: pytest.fail('it was trained'))
        line = refusal(capsys, *command_line, '--out', str(out))
        assert f"out' is being written by another process (pid {process.pid}); wait for it" in line
        assert sorted(path.name for path in out.iterdir()) == before
        monkeypatch.undo()
    assert main([*command_line, '--out', str(out), *(['--dims', '1'] if command == 'landscape' else [])]) == 0
    assert not [path for path in out.iterdir() if path.name.startswith('.')]


def test_the_folder_of_a_run_has_one_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It can be shared by comparisons whose results lie in different folders."""
    arguments = ['compare', SGD, *QUICK, f'save_folder={tmp_path}/runs', '--out', str(tmp_path / 'out')]
    with another_process(tmp_path / 'runs' / 'SGD-seed17') as process:
        line = refusal(capsys, *arguments)
        assert f"save_folder: '{tmp_path}/runs/SGD-seed17' is being written by another process" in line
        assert f'(pid {process.pid})' in line
        assert not (tmp_path / 'out').exists()
    assert main(arguments) == 0


def test_the_first_of_the_processes_of_a_run_holds_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(SGD, overrides=[f'save_folder={tmp_path}/run'])
    with another_process(tmp_path / 'run'):
        with pytest.raises(RecipeError, match='^save_folder: .*is being written'), hold_folder(recipe):
            pytest.fail('it was held twice')
        monkeypatch.setenv('RANK', '1')
        with hold_folder(recipe):  # that of the first process is the run's
            pass
        monkeypatch.undo()
    with hold_folder(recipe):
        assert (tmp_path / 'run').is_dir()
    assert not (tmp_path / 'run').exists()  # nothing was trained
    with hold_folder(load_recipe(SGD)):
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_comparison_goes_on_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While it runs a second one is refused; that it was killed locks nothing."""
    out = tmp_path / 'out'
    arguments = [
        'compare',
        SGD,
        'max_duration=10ep',
        'model.hidden=[4]',
        '--jobs',
        '1',
        '--seeds',
        '3',
        '--out',
        str(out),
    ]
    process = started(arguments, out, 'runs/*.json')
    assert f'is being written by another process (pid {process.pid})' in refusal(capsys, *arguments)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    assert main(arguments) == 0
    assert ' of 3 runs are done' in capsys.readouterr().err
    assert not [path for path in out.iterdir() if path.name.startswith('.')]

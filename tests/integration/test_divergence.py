"""A run whose loss is not finite has failed, in every command that trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from composer_sam.commands.main import main
from composer_sam.recipes import Diverged, History, build_trainer, load_recipe

REPOSITORY = Path(__file__).parents[2]
SGD, SAM = (str(REPOSITORY / 'yamls' / 'digits' / f'{name}.yaml') for name in ('sgd', 'sam'))
EXPLODES = ['optimizer.lr=1e30', 'max_duration=2ep']
BEGAN = 'the training loss is not finite from step 2 on; '
ADVICE = 'Try a lower optimizer.lr (now 1e+30)'


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    captured = capfd.readouterr()
    assert 'test accuracy' not in captured.out and 'Traceback' not in captured.err
    return captured.err.strip().splitlines()[-1]


def test_training_stops_after_ten_steps_and_says_what_to_try(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(['train', SGD, *EXPLODES]) == 1
    line = last_line(capfd)
    assert line.startswith(f'composer-sam: training failed: {BEGAN}training was stopped after step 11. {ADVICE}')
    assert 'rho' not in line


def test_with_a_method_its_radius_and_skipping_are_suggested(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(['train', SAM, *EXPLODES]) == 1
    line = last_line(capfd)
    assert ADVICE in line and 'algorithms.sam.rho (now 0.5)' in line and 'algorithms.sam.on_nonfinite=skip' in line


def test_another_number_of_steps(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(['train', SGD, *EXPLODES, 'stop_at_nonfinite=1']) == 1
    assert f'{BEGAN}training was stopped after step 2.' in last_line(capfd)


@pytest.mark.parametrize('tests', ['1ep', 0])
def test_without_the_stop_the_end_has_failed_all_the_same(tests: str | int, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(['train', SGD, *EXPLODES, 'stop_at_nonfinite=0', f'eval_interval={tests}']) == 1
    end = 'the test loss at step 42 is nan' if tests else 'training ended at step 42'
    assert f'{BEGAN}{end}. {ADVICE}' in last_line(capfd)


def test_a_finished_run_that_has_diverged_has_still_failed_when_it_is_run_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = ['train', SGD, *EXPLODES, 'stop_at_nonfinite=0', f'save_folder={tmp_path}', 'autoresume=true']
    assert main(again) == 1
    first = last_line(capfd)
    assert main(again) == 1
    assert last_line(capfd) == first  # the step at which it began is part of the checkpoint


def test_single_steps_that_are_skipped_stop_nothing() -> None:
    """The count begins anew after every step whose loss is finite, and a finite test at the end is a success."""
    trainer = build_trainer(load_recipe(SGD, overrides=['max_duration=1ep', 'stop_at_nonfinite=2']), [_EveryOther()])
    trainer.fit()
    trainer.close()
    assert trainer.state.timestamp.batch.value == 21


class _EveryOther(History):
    """Shows every other training loss as not finite."""

    def batch_end(self, state, logger) -> None:  # type: ignore[no-untyped-def]
        super().batch_end(state, logger)
        if state.timestamp.batch.value % 2:
            state.total_loss_dict = {'loss/train/total': float('inf')}


def test_the_error_is_a_type_of_its_own() -> None:
    trainer = build_trainer(load_recipe(SGD, overrides=EXPLODES))
    with pytest.raises(Diverged, match='^the training loss is not finite from step 2 on; '):
        trainer.fit()
    trainer.close()


def test_compare_reports_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(['compare', SGD, *EXPLODES, '--out', str(tmp_path)]) == 1
    assert f'SGD-seed17 failed: {BEGAN}training was stopped after step 11. {ADVICE}' in last_line(capfd)
    assert not (tmp_path / 'comparison.png').exists()


def test_study_reports_the_run_and_finishes_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    grid = ['--grid', 'optimizer.lr=0.1,1e30', '--no-sharpness', 'max_duration=1ep']
    assert main(['study', SGD, *grid, '--out', str(tmp_path)]) == 1
    captured = capfd.readouterr()
    assert 'Traceback' not in captured.err
    assert f'composer-sam: 1 of 2 runs failed: SGD_lr=1e+30_seed=17 failed: {BEGAN}' in captured.err
    assert [file.stem for file in (tmp_path / 'runs').iterdir()] == ['SGD_lr=0.1_seed=17']


def test_two_processes_stop_alike() -> None:
    done = subprocess.run(
        [sys.executable, '-m', 'composer.cli', '-n', '2', '-m', 'composer_sam', 'train', SGD, *EXPLODES],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    failed = [line for line in done.stderr.splitlines() if line.startswith('composer-sam: training failed: ')]
    assert failed and all(f'{BEGAN}training was stopped after step 11.' in line for line in failed)

"""A run that is told to stop by SIGTERM: it saves the step it is at, ends on all processes, and goes on from there."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from composer.core import State
from told_runs import PATH, RUN, SAM, TOLD, content

from composer_sam.commands.main import main
from composer_sam.recipes import RecipeError, build_trainer, load_recipe
from composer_sam.recipes.preemption import SECONDS, Preemption

# A run resumed at the end of an epoch first finishes that epoch, without a batch, of which both packages warn.
pytestmark = [
    pytest.mark.filterwarnings('ignore:No batches were trained for global rank:UserWarning'),
    pytest.mark.filterwarnings(
        'ignore:The ``compute`` method of metric MulticlassAccuracy was called before:UserWarning'
    ),
]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run that nobody stops ends with."""
    folder = tmp_path_factory.mktemp('undisturbed')
    assert main([*RUN, f'save_folder={folder}']) == 0
    return content(folder / 'ep3-ba63-rank0.pt')


def tell(event: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be told to stop at an event of a step; most events come in both passes of SAM."""

    def stop(callback: Preemption, state: State, logger: object) -> None:
        del callback, logger
        if state.timestamp.batch == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Preemption, event, stop)


@pytest.mark.parametrize(
    ('event', 'step', 'epoch'),
    [
        ('batch_start', 1, 0),
        ('before_forward', 7, 0),
        ('after_backward', 10, 0),  # after which there is a test
        ('after_dataloader', 21, 0),  # the last of the epoch
        ('after_backward', 30, 1),
        ('after_backward', 63, 2),  # the last of all
    ],
)
def test_one_process_saves_the_step_and_goes_on_bit_identical(
    event: str,
    step: int,
    epoch: int,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = [*RUN, f'save_folder={tmp_path}']
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as told:
        tell(event, step, told)
        assert main(run) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f'{TOLD} after {step} steps; the checkpoint of step {step} is in {tmp_path}: autoresume=true goes on from it'
    )
    saved = f'ep{epoch}-ba{step}-rank0.pt'
    assert sorted(path.name for path in tmp_path.glob('*.pt')) == [saved, 'latest-rank0.pt']
    assert (tmp_path / 'latest-rank0.pt').resolve().name == saved
    assert main(run) == 0
    assert f'resumed from {tmp_path}/{saved} at step {step}\n' in capsys.readouterr().err
    resumed = content(tmp_path / 'ep3-ba63-rank0.pt')
    assert resumed.keys() == undisturbed.keys() == {'state', 'rng'}
    assert resumed['rng'] == undisturbed['rng']
    for key in undisturbed['state']:
        assert resumed['state'][key] == undisturbed['state'][key], key


def test_told_in_the_last_step_of_a_run_counted_in_steps_it_ends_as_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell('after_backward', 5, monkeypatch)
    assert main([*RUN, 'max_duration=5ba', f'save_folder={tmp_path}']) == 0
    captured = capsys.readouterr()
    assert ' after 5 steps ' in captured.out
    assert TOLD not in captured.err
    assert (tmp_path / 'ep0-ba5-rank0.pt').is_file()


def test_without_a_folder_it_says_that_nothing_was_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell('after_backward', 3, monkeypatch)
    assert main([*RUN, 'autoresume=false']) == 143
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f'{TOLD} after 3 steps; nothing was saved: save_folder=FOLDER and autoresume=true would let it go on'


def test_a_checkpoint_saver_of_the_recipe_saves_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell('after_backward', 3, monkeypatch)
    saver = f'callbacks.checkpoint_saver={{folder: {tmp_path}, save_interval: 100ep}}'
    assert main([*RUN, 'autoresume=false', saver]) == 143
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f'{TOLD} after 3 steps; callbacks.checkpoint_saver has saved step 3: load_path goes on from it'
    assert (tmp_path / 'ep0-ba3-rank0.pt').is_file()


def test_a_checkpoint_of_weights_only_is_none_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell('after_backward', 3, monkeypatch)
    assert main([*RUN, f'save_folder={tmp_path}', 'trainer.save_weights_only=true']) == 143
    assert 'the checkpoint of step 3' not in capsys.readouterr().err
    assert not list(tmp_path.glob('*.pt'))


def test_before_training_it_ends_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tell('init', 1, monkeypatch)
    assert main([*RUN, 'autoresume=false']) == 143
    assert capsys.readouterr().err.splitlines()[-1] == TOLD


def test_the_workers_of_a_loader_outlast_what_every_process_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a cluster sends SIGTERM to every process of a job; torch takes a worker that it killed for an error."""

    def stop(callback: Preemption, state: State, logger: object) -> None:
        del callback, logger
        if state.timestamp.batch == 4:
            workers = [worker.pid for worker in multiprocessing.active_children()]
            assert len(workers) == 2
            # By another process: a worker does end when its own process tells it to.
            subprocess.run(['kill', '-TERM', *map(str, [*workers, os.getpid()])], check=True)
            time.sleep(0.2)

    monkeypatch.setattr(Preemption, 'batch_start', stop)
    assert main([*RUN, f'save_folder={tmp_path}', 'data.num_workers=2']) == 143
    assert (tmp_path / 'ep0-ba5-rank0.pt').is_file()
    assert not multiprocessing.active_children()


def test_told_while_it_reports_an_error_it_reports_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the launcher tells the others when one process has failed."""

    def fail(callback: Preemption, state: State, logger: object) -> None:
        del callback, state, logger
        raise RuntimeError('injected')

    monkeypatch.setattr(Preemption, 'after_backward', fail)
    monkeypatch.setattr('traceback.print_exc', lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*RUN, 'autoresume=false']) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith('RuntimeError: injected')


def script(lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, '-c', lines],
        env={**os.environ, 'PYTHONPATH': PATH},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_process_that_waits_in_cpp_ends_after_the_time(tmp_path: Path) -> None:
    """Python calls no handler there, as in a collective whose other process is dead."""
    done = script(f"""
import os, signal, threading
import torch.distributed
from composer_sam.recipes.preemption import Preemption

store = torch.distributed.FileStore({str(tmp_path / 'store')!r}, 1)
with Preemption(seconds=0.5).listening():
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    store.get('what nobody sets')
""")
    assert done.returncode == 143, done.stderr
    assert done.stderr.splitlines()[-1] == (
        f'{TOLD}, but the batch, evaluation or checkpoint under way has not ended in 0.5 seconds: '
        'it ends without a checkpoint of this step'
    )


def test_a_forked_process_is_told_for_itself() -> None:
    done = script("""
import os, signal, time
from composer_sam.recipes.preemption import Preemption

with Preemption(seconds=0.2).listening():
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    time.sleep(1)
    print('alive')
""")
    assert done.stdout.split() == ['143', 'alive'], done.stderr


def test_a_process_that_ends_does_not_hear_it_again() -> None:
    """Python takes its handlers away before it is done, and the exit code would be another one."""
    done = script("""
import atexit, os, signal

def late():
    print(signal.getsignal(signal.SIGTERM) is signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGTERM)

atexit.register(late)
from composer_sam.recipes.preemption import Preemption

with Preemption().listening():
    os.kill(os.getpid(), signal.SIGTERM)
""")
    assert (done.returncode, done.stdout) == (143, 'True\n'), done.stderr


def test_the_help_names_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['train', '--help']) == 0
    assert f'longer than {SECONDS} seconds' in ' '.join(capsys.readouterr().out.split())


def test_the_timeout_of_the_recipe_is_that_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts: list[float] = []

    def initialize(device: object, timeout: float) -> None:
        del device
        timeouts.append(timeout)
        raise RecipeError('this is enough')

    monkeypatch.setattr('composer_sam.recipes.build.dist.get_world_size', lambda: 2)
    monkeypatch.setattr('composer_sam.recipes.build.dist.initialize_dist', initialize)
    for overrides in ([], ['trainer.dist_timeout=45']):
        with pytest.raises(RecipeError, match='this is enough'):
            build_trainer(load_recipe(SAM, overrides=overrides))
    assert timeouts == [300.0, 45.0]


@pytest.mark.slow
def test_told_at_random_moments_again_and_again_it_ends_as_the_undisturbed_run(tmp_path: Path) -> None:
    moments = random.Random(0)
    longer = [*RUN, 'max_duration=100ep', 'eval_interval=30ep', 'algorithms.sam.interval=3']
    command = [sys.executable, '-m', 'composer_sam', *longer, f'save_folder={tmp_path / "parts"}']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': PATH}
    steps = 0
    for _ in range(5):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        described = next(line for line in process.stderr if 'base optimizer' in line)
        time.sleep(moments.uniform(0.0, 1.0))
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 143, described + errors
        (step,) = map(int, re.findall(r'the checkpoint of step (\d+) is in', errors))
        assert step > steps
        steps = step
    assert main(command[3:]) == 0
    assert main([*longer, f'save_folder={tmp_path / "whole"}']) == 0
    parts, whole = (content(tmp_path / folder / 'ep100-ba2100-rank0.pt') for folder in ('parts', 'whole'))
    assert parts['rng'] == whole['rng']
    assert all(parts['state'][key] == whole['state'][key] for key in whole['state'])

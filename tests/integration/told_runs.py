"""Runs that are told to stop by SIGTERM, what their checkpoints hold, and two processes of which one acts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checkpoint_content import comparable

__all__ = ['PATH', 'RUN', 'SAM', 'TOLD', 'content', 'ended', 'two_processes', 'worker']

REPOSITORY = Path(__file__).parents[2]
SAM = str(REPOSITORY / 'yamls' / 'digits' / 'sam.yaml')
PATH = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get('PYTHONPATH')]))
TOLD = 'composer-sam: told to stop (SIGTERM)'
# 21 steps per epoch, a test in the middle of an epoch, and no checkpoint of the interval's own before the end.
RUN = ['train', SAM, 'max_duration=3ep', 'eval_interval=10ba', 'save_interval=100ep', 'seed=3', 'autoresume=true']


def content(checkpoint: Path) -> dict[str, Any]:
    return comparable(torch.load(checkpoint, weights_only=False))


# What one of several processes does at a step, and where.
SCRIPT = """
import os, signal, sys
from composer_sam.commands.main import main
from composer_sam.recipes.preemption import Preemption

def act(callback, state, logger):
    if os.environ['RANK'] == os.environ['AT_RANK'] and state.timestamp.batch == int(os.environ['AT_STEP']) - 1:
        {action}

if 'AT_STEP' in os.environ:
    Preemption.after_backward = act
sys.exit(main(sys.argv[1:]))
"""
STOP = 'os.kill(os.getpid(), signal.SIGTERM)'


def two_processes(folder: Path, *overrides: str, action: str = STOP, rank: int = 1, step: int | None = None) -> Any:
    """A run of two processes under the launcher; one of them acts in a step."""
    folder.mkdir(exist_ok=True)
    path = folder / 'script.py'
    path.write_text(SCRIPT.format(action=action))
    at = {} if step is None else {'AT_RANK': str(rank), 'AT_STEP': str(step)}
    return psutil.Popen(
        [*(sys.executable, '-m', 'composer.cli', '-n', '2', str(path)), *RUN, f'save_folder={folder}', *overrides],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': PATH, **at},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(launcher: Any) -> tuple[int, str, str]:
    """The exit code and the output when nothing of a run is left; well before Composer's collectives give up."""
    try:
        output, errors = launcher.communicate(timeout=120)
        with pytest.raises(ProcessLookupError):
            os.killpg(launcher.pid, 0)
        return launcher.returncode, output, errors
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.communicate()


def worker(launcher: Any, rank: int) -> psutil.Process:
    return next(child for child in launcher.children() if child.environ()['RANK'] == str(rank))

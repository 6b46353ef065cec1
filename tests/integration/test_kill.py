"""A training process killed at random moments, again and again, ends where an undisturbed one ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
KILLS = 20


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, '-m', 'composer_sam', 'train', str(ROOT / 'yamls/digits/sam.yaml')),
        *('max_duration=16ep', 'eval_interval=100ep', 'algorithms.sam.interval=3', 'seed=3'),
        *(f'save_folder={folder}', 'save_interval=1ba', 'autoresume=true', 'run_name=killed'),
        'trainer.save_num_checkpoints_to_keep=2',
    ]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes], folder: Path) -> dict[str, torch.Tensor]:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-3000:]
    checkpoint = torch.load(folder / 'latest-rank0.pt', weights_only=False)
    return {**checkpoint['state']['model'], 'batch': checkpoint['state']['timestamp']['Timestamp']['batch']}


@pytest.mark.slow
def test_killed_twenty_times_ends_as_the_undisturbed_run(tmp_path: Path) -> None:
    moments = random.Random(0)
    killed = tmp_path / 'killed'
    kills = 0
    while kills < KILLS:
        process = start(killed)
        seen = set(killed.glob('ep*')) if killed.exists() else set()
        deadline = time.monotonic() + 120
        while process.poll() is None and not ({*killed.glob('ep*')} - seen) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, 0.3))
        if process.poll() is not None:
            pytest.fail(
                f'the run ended before it was killed often enough:\n{process.communicate()[1].decode()[-3000:]}'
            )
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    disturbed = finish(start(killed), killed)
    undisturbed = finish(start(tmp_path / 'whole'), tmp_path / 'whole')
    assert disturbed.keys() == undisturbed.keys()
    assert disturbed.pop('batch') == undisturbed.pop('batch')
    assert all(torch.equal(disturbed[name], undisturbed[name]) for name in disturbed)

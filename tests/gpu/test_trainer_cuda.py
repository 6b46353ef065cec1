"""The Trainer on a GPU: half precision, resuming, and the launcher with every GPU there is. Skipped without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback, Trainer
from composer.core import State
from composer.loggers import Logger
from composer.models import ComposerClassifier
from composer.optim import CosineAnnealingScheduler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_sam import registry
from composer_sam.methods.base import SharpnessAware
from tests.problems import batches, gradient, made, needs_graph, network, same, with_all_passes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]
ONCE_DIFFERENTIATED = [name for name in sorted(registry) if not needs_graph(name)]
STEPS = 10


class _Watch(Callback):
    """Notes the scale, and the step before which a gradient is made to overflow in the pass ``at``."""

    def __init__(self, at: int = 0):
        self.at, self.passes = at, 0
        self.scales: list[float] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        del state, logger
        self.passes = 0

    def after_backward(self, state: State, logger: Logger) -> None:
        del logger
        self.passes += 1
        if state.timestamp.batch == 5 and self.passes == self.at:
            gradient(next(state.model.parameters())).fill_(float('inf'))

    def batch_end(self, state: State, logger: Logger) -> None:
        del logger
        if state.scaler is not None:
            self.scales.append(state.scaler.get_scale())


def _trainer(method: SharpnessAware, *callbacks: Callback, **settings: Any) -> Trainer:
    torch.manual_seed(7)
    model = ComposerClassifier(network(), num_classes=4)
    x, y = (torch.cat(parts) for parts in zip(*batches(STEPS), strict=True))
    return Trainer(
        model=model,
        train_dataloader=DataLoader(TensorDataset(x, y), batch_size=12),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        schedulers=CosineAnnealingScheduler(),
        algorithms=[method],
        callbacks=list(callbacks),
        device='gpu',
        seed=3,
        progress_bar=False,
        **{'max_duration': '2ep', **settings},
    )


def _weights(trainer: Trainer) -> torch.Tensor:
    return nn.utils.parameters_to_vector(trainer.state.model.parameters()).detach().float().cpu()


@pytest.mark.parametrize('precision', ['amp_bf16', 'amp_fp16'])
@pytest.mark.parametrize('name', ONCE_DIFFERENTIATED)
def test_half_precision_trains_near_fp32(name: str, precision: str) -> None:
    ends = []
    for chosen in ('fp32', precision):
        trainer = _trainer(with_all_passes(name, interval=2), precision=chosen)
        trainer.fit()
        ends.append(_weights(trainer))
    assert ends[1].isfinite().all()
    torch.testing.assert_close(*ends, rtol=0.1, atol=0.05)


@pytest.mark.parametrize('name', ONCE_DIFFERENTIATED)
def test_an_overflow_in_any_pass_backs_off_once(name: str) -> None:
    for at in range(1, with_all_passes(name).passes + 1):
        watch = _Watch(at)
        trainer = _trainer(with_all_passes(name, interval=2), watch, precision='amp_fp16')
        trainer.fit()
        before, after = watch.scales[4], watch.scales[5]
        assert after == before / 2, f'pass {at}'
        assert _weights(trainer).isfinite().all()


@pytest.mark.parametrize('precision', ['fp32', 'amp_fp16'])
@pytest.mark.parametrize('name', sorted(registry))
def test_resumed_equals_uninterrupted(name: str, precision: str, tmp_path: Path) -> None:
    if precision == 'amp_fp16' and name not in ONCE_DIFFERENTIATED:
        pytest.skip('refused')
    settings = {'precision': precision, 'deterministic_mode': True}
    whole = _trainer(made(name, interval=2), save_folder=str(tmp_path), save_interval='1ba', **settings)
    whole.fit()
    resumed = _trainer(made(name, interval=2), load_path=str(tmp_path / 'ep0-ba7-rank0.pt'), **settings)
    resumed.fit()
    assert same(_weights(whole), _weights(resumed))


def _launched(count: int, *arguments: str, folder: Path) -> torch.Tensor:
    out = folder / '-'.join(arguments)
    script = str(Path(__file__).with_name('launched.py'))
    launcher = [sys.executable, '-m', 'composer.cli.launcher', '-n', str(count)] if count else [sys.executable]
    root = Path(__file__).parents[2]
    environment = {**os.environ, 'PYTHONPATH': str(root)}
    done = subprocess.run(
        [*launcher, script, arguments[0], str(out), *arguments[1:]], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.parametrize('wrapper', ['ddp', 'fsdp1', 'fsdp2'])
@pytest.mark.parametrize('name', ['SAM', 'FunctionalSAM', 'GAM'])
def test_all_gpus_train_as_one_process_on_the_union(name: str, wrapper: str, tmp_path: Path) -> None:
    """NCCL where there are two; with one GPU Composer's FSDP1 runs on one rank."""
    count = torch.cuda.device_count()
    ranks = _launched(count, wrapper, '--method', name, folder=tmp_path)
    alone = _launched(0, 'alone', '--method', name, '--world', str(count), folder=tmp_path)
    torch.testing.assert_close(ranks, alone, rtol=1e-3, atol=1e-4)

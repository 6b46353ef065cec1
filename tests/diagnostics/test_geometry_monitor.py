"""The monitor of the gradient's geometry in the real Trainer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from torch.utils.data import DataLoader, TensorDataset

from composer_sam import SAM
from composer_sam.diagnostics import GradientGeometry
from composer_sam.trainers.composer import GradientGeometryMonitor
from tests.problems import batches, network


def _trainer(monitor: GradientGeometryMonitor, *algorithms: Any, **settings: Any) -> tuple[Trainer, InMemoryLogger]:
    torch.manual_seed(7)
    model = ComposerClassifier(network(), num_classes=4)
    x, y = (torch.cat(parts) for parts in zip(*batches(8), strict=True))
    logger = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(TensorDataset(x, y), batch_size=12),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        algorithms=list(algorithms),
        callbacks=[monitor],
        loggers=[logger],
        device='cpu',
        seed=3,
        progress_bar=False,
        **{'max_duration': '2ep', **settings},
    )
    return trainer, logger


def _steps(logger: InMemoryLogger) -> list[int]:
    return [timestamp.batch.value for timestamp, _ in logger.data['geometry/cosine']]


@pytest.mark.parametrize(('interval', 'expected'), [(1, [2, 4, 6, 8, 10, 12, 14, 16]), (3, [6, 12])])
def test_the_monitor_logs_perturbed_steps(interval: int, expected: list[int]) -> None:
    trainer, logger = _trainer(GradientGeometryMonitor(interval), SAM(interval=2))
    trainer.fit()
    assert _steps(logger) == expected
    assert {key for key in logger.data if key.startswith('geometry/')} == {
        f'geometry/{field.name}' for field in dataclasses.fields(GradientGeometry)
    }


def test_the_monitor_s_count_goes_on_after_a_resume(tmp_path: Any) -> None:
    whole, logger = _trainer(GradientGeometryMonitor(3), SAM(), save_folder=str(tmp_path), save_interval='1ba')
    whole.fit()
    resumed, again = _trainer(GradientGeometryMonitor(3), SAM(), load_path=str(tmp_path / 'ep0-ba4-rank0.pt'))
    resumed.fit()
    assert _steps(again) == [step for step in _steps(logger) if step > 4]


def test_the_monitor_without_a_method_is_an_error() -> None:
    trainer, _ = _trainer(GradientGeometryMonitor())
    with pytest.raises(ValueError, match='algorithms='):
        trainer.fit()


@pytest.mark.parametrize('interval', [0, -1, 1.5, True])
def test_bad_intervals(interval: Any) -> None:
    with pytest.raises(ValueError, match='interval'):
        GradientGeometryMonitor(interval)

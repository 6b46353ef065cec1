"""Hugging Face's Trainer: checkpoints of runs with a method, and scalers for fp16."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip('transformers', reason="transformers is not installed: pip install 'composer-sam[transformers]'")
pytest.importorskip('accelerate', reason="accelerate is not installed: pip install 'composer-sam[transformers]'")

from transformers import Trainer

from composer_sam import SAM
from composer_sam.trainers.transformers import SharpnessAwareTrainer
from tests.hosts.small_trainers import At, Classifier, arguments, fresh_accelerate, samples, trainer_of
from tests.problems import made, same

STEPS = 10


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    with fresh_accelerate():
        yield


def run(name: str | None, folder: Path, values: dict[str, Any], resume: Path | None = None) -> Any:
    """A run of two epochs, which shuffles and drops out; resumed in the first one if there is a checkpoint."""
    torch.manual_seed(3 if resume is None else 99)
    args = arguments(
        folder, gradient_accumulation_steps=2, save_strategy='steps', save_steps=4, num_train_epochs=2, seed=11
    )
    method, kind = (None, Trainer) if name is None else (made(name, **values), SharpnessAwareTrainer)
    trainer = trainer_of(method, args, samples(STEPS), Classifier(seed=0 if resume is None else 5), kind=kind)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume / 'checkpoint-4'))
    return trainer


def assert_same_end(found: Any, expected: Any) -> None:
    assert found.state.global_step == expected.state.global_step == STEPS
    assert same(found.model.state_dict(), expected.model.state_dict())
    assert same(found.optimizer.state_dict(), expected.optimizer.state_dict())


@pytest.mark.parametrize('name', ['SAM', 'WSAM', 'GAM', 'MSAM', 'LookSAM'])
def test_a_resumed_run_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {} if name == 'LookSAM' else {'interval': 3}
    expected = run(name, tmp_path / 'whole', values)
    found = run(name, tmp_path / 'resumed', values, tmp_path / 'whole')
    assert_same_end(found, expected)
    assert found.sharpness_aware_optimizer.steps_taken == STEPS - 4
    assert found.sharpness_aware_optimizer.steps_perturbed == (STEPS - 4 if name == 'LookSAM' else 2)


def test_a_checkpoint_loads_without_the_method(tmp_path: Path) -> None:
    expected = run('LookSAM', tmp_path / 'whole', {'end': '4ba'})
    assert_same_end(run(None, tmp_path / 'resumed', {}, tmp_path / 'whole'), expected)


def test_a_checkpoint_from_without_the_method_loads(tmp_path: Path) -> None:
    run(None, tmp_path / 'plain', {})
    found = run('SAM', tmp_path / 'resumed', {'start': '4ba'}, tmp_path / 'plain')
    assert_same_end(found, run('SAM', tmp_path / 'whole', {'start': '4ba'}))
    assert found.sharpness_aware_optimizer.steps_perturbed == STEPS - 4


# Scalers. Accelerate makes one on accelerators only, so the tests put one of the CPU where it puts its own.


def scaled(trainer: Any, scaler: torch.amp.GradScaler) -> Any:
    def begin(*_: Any) -> None:  # for the unscaling before clipping; models were prepared without autocast
        trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = 'fp16'

    trainer.accelerator.scaler = scaler
    trainer.add_callback(At('on_train_begin', begin))
    return trainer


@pytest.mark.parametrize('name', ['SAM', 'WSAM', 'GAM', 'MSAM'])
def test_a_scaler_changes_no_bit(name: str, tmp_path: Path) -> None:
    found: list[Any] = []
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0, growth_interval=2)
    for with_scaler in (False, True):
        torch.manual_seed(3)
        trainer = trainer_of(made(name, interval=2), arguments(tmp_path, gradient_accumulation_steps=2), samples(8))
        (scaled(trainer, scaler) if with_scaler else trainer).train()
        found.append(copy.deepcopy(trainer.model.state_dict()))
    assert same(*found)
    assert scaler.get_scale() == 4096.0


@pytest.mark.parametrize('values', [{}, {'ascent_fraction': 0.5}], ids=['whole', 'part'])
@pytest.mark.parametrize('bad', [1, 2])
def test_an_overflow_in_any_pass_skips_the_step_and_the_schedule(
    bad: int, values: dict[str, Any], tmp_path: Path
) -> None:
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
    args = arguments(tmp_path, lr_scheduler_type='linear')
    trainer = scaled(trainer_of(SAM(rho=0.1, **values), args, samples(4)), scaler)
    weights: list[Any] = []
    scales: list[float] = []
    rates: list[float] = []

    def note(*_: Any) -> None:
        weights.append(copy.deepcopy(dict(trainer.model.named_parameters())))
        scales.append(scaler.get_scale())
        rates.append(trainer.lr_scheduler.get_last_lr()[0])

    trainer.add_callback(At('on_step_begin', note))
    backwards: list[int] = []

    def overflow(gradient: Tensor) -> Tensor:
        backwards.append(1)
        return gradient * torch.inf if len(backwards) == 2 + bad else gradient  # in the second step

    next(trainer.model.parameters()).register_hook(overflow)
    trainer.train()
    assert scales == [1024.0, 1024.0, 512.0, 512.0]
    assert same(weights[2], weights[1])
    assert not same(weights[3], weights[2])
    assert rates[0] > rates[1] == rates[2] > rates[3]
    assert trainer.sharpness_aware_optimizer.steps_taken == 3

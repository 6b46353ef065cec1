"""Hugging Face's Trainer: what a run with a method logs and counts, and what it leaves as it was."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip('transformers', reason="transformers is not installed: pip install 'composer-sam[transformers]'")
pytest.importorskip('accelerate', reason="accelerate is not installed: pip install 'composer-sam[transformers]'")

from transformers import Trainer

from composer_sam import SAM
from composer_sam.trainers.transformers import SharpnessAwareMixin
from tests.hosts.small_trainers import (
    CLIP,
    At,
    Classifier,
    arguments,
    assert_same_run,
    fresh_accelerate,
    in_order,
    samples,
    trainer_of,
)
from tests.problems import BASES, made, same


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    with fresh_accelerate():
        yield


def test_what_is_logged_is_of_w_and_of_the_direction(tmp_path: Path) -> None:
    method, twin = SAM(rho=0.1, interval=2), Classifier()
    options: dict[str, Any] = {'gradient_accumulation_steps': 2, 'lr_scheduler_type': 'linear', 'warmup_steps': 2}
    args = arguments(tmp_path, logging_strategy='steps', logging_steps=1, **options)
    plain = trainer_of(None, args, samples(8))
    plain.train()
    base = BASES['SGD'](twin.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda step: step / 2 if step < 2 else (4 - step) / 2)
    base.register_step_post_hook(lambda *_: scheduler.step())
    trainer = trainer_of(method, args, samples(8))
    losses, norms = assert_same_run(trainer, method, twin, base)

    *logs, end = trainer.state.log_history
    assert [entry['learning_rate'] for entry in logs] == [
        entry['learning_rate'] for entry in plain.state.log_history if 'loss' in entry
    ]
    assert [entry['loss'] for entry in logs] == pytest.approx([loss.item() for loss in losses], abs=5e-5)
    assert [entry['grad_norm'] for entry in logs] == pytest.approx([norm.item() for norm in norms], rel=1e-6)
    assert min(entry['grad_norm'] for entry in logs) > CLIP
    assert [entry['sam/perturbed'] for entry in logs] == [0.0, 1.0, 0.0, 1.0]
    assert [entry['sam/interval_phase'] for entry in logs] == [1, 0, 1, 0]
    assert [entry.get('sam/rho') for entry in logs] == [None, 0.1, None, 0.1]
    assert all(entry['sam/perturbed_loss'] > entry['loss'] + 1e-3 for entry in logs[1::2])
    assert all(entry['sam/gradient_norm'] > 0 for entry in logs[1::2])
    assert 'train_loss' in end
    assert not any(name.startswith('sam/') for name in end)


class Counting(Trainer):
    """A Trainer that counts and logs in its loss, in all the ways that are usual."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.calls = 0
        self.history: list[float] = []
        self.recent: deque[float] = deque(maxlen=2)
        self.seen: set[int] = set()
        self.total: dict[str, Any] = {'loss': torch.zeros(()), 'steps': 0}
        self._metrics: dict[str, dict[str, list[float]]] = {'train': {}}

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(*args, **kwargs)
        value = loss.item()
        self.seen.add(self.calls)
        self.calls += 1
        self.history.append(value)
        self.recent.append(value)
        self.total['loss'] += value
        self.total['steps'] += 1
        self._metrics['train'].setdefault('loss', []).append(value)
        self.newest = value
        self.state.num_input_tokens_seen += 1
        self.log({'auxiliary': value})
        return loss


class SharpCounting(SharpnessAwareMixin, Counting):
    """The same with a method."""


@pytest.mark.parametrize('values', [{}, {'ascent_fraction': 0.5}], ids=['whole', 'part'])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_what_a_trainer_counts_counts_once(accumulate: int, values: dict[str, Any], tmp_path: Path) -> None:
    method, twin = SAM(rho=0.1, **values), Classifier()
    args = arguments(tmp_path, gradient_accumulation_steps=accumulate)
    trainer = trainer_of(method, args, samples(4), kind=in_order(SharpCounting))
    told: list[float] = []
    trainer.add_callback(At('on_log', lambda state, _: told.append(state.log_history[-1].get('auxiliary'))))
    losses, _ = assert_same_run(trainer, method, twin, BASES['SGD'](twin.parameters()))
    history = trainer.history
    per_step = [sum(history[first : first + accumulate]) / accumulate for first in range(0, 4, accumulate)]
    assert per_step == pytest.approx([loss.item() for loss in losses], rel=1e-6)
    assert trainer.calls == trainer.total['steps'] == trainer.state.num_input_tokens_seen == 4
    assert trainer.seen == {0, 1, 2, 3}
    assert trainer._metrics['train']['loss'] == history
    assert list(trainer.recent) == history[-2:]
    assert trainer.newest == history[-1]
    assert trainer.total['loss'].item() == pytest.approx(sum(history), rel=1e-6)
    assert [entry['auxiliary'] for entry in trainer.state.log_history if 'auxiliary' in entry] == history
    assert told == [*history, None]  # the last one is of the end of the run


def test_arguments_callbacks_and_accelerator_stay_as_they_were(tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    before = copy.deepcopy(args.to_dict())
    trainer = trainer_of(made('SGDHess'), args, samples(2))
    callbacks = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert args.to_dict() == before
    assert trainer.callback_handler.callbacks == callbacks
    assert 'backward' not in vars(trainer.accelerator)
    assert trainer.accelerator.sync_gradients


def test_after_training_it_evaluates_predicts_and_saves_the_weights_w(tmp_path: Path) -> None:
    data = samples(2, seed=5)
    trainer = trainer_of(made('MSAM'), arguments(tmp_path), samples(3), eval_dataset=data)
    trainer.train()
    weights = copy.deepcopy(trainer.model.state_dict())
    twin = Classifier().eval()
    twin.load_state_dict(weights)
    x, labels = (torch.stack([sample[name] for sample in data]) for name in ('x', 'labels'))
    logits = torch.cat([twin(part)['logits'].detach() for part in x.split(12)])
    assert torch.equal(torch.as_tensor(trainer.predict(data).predictions), logits)
    loss = nn.functional.cross_entropy(logits, labels)
    assert trainer.evaluate()['eval_loss'] == pytest.approx(loss.item(), rel=1e-5)
    trainer.save_model(str(tmp_path / 'saved'))
    assert same(trainer.model.state_dict(), weights)


def test_a_training_step_by_hand_is_the_trainers_own(tmp_path: Path) -> None:
    trainer = trainer_of(SAM(), arguments(tmp_path), samples(1))
    trainer.train()
    inputs = {'x': torch.randn(4, 6), 'labels': torch.zeros(4, dtype=torch.long)}
    assert trainer.training_step(trainer.model, inputs) > 0
    assert trainer.model.counted.forwards == 2 + 1

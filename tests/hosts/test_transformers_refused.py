"""Hugging Face's Trainer: what cannot be used with a method is refused, and says what can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip('transformers', reason="transformers is not installed: pip install 'composer-sam[transformers]'")
pytest.importorskip('accelerate', reason="accelerate is not installed: pip install 'composer-sam[transformers]'")

from transformers import Trainer

from composer_sam import SAM, SharpnessAwareOptimizer
from composer_sam.trainers.transformers import SharpnessAwareMixin
from composer_sam.trainers.transformers.checks import check_class, check_trainer
from tests.hosts.small_trainers import Classifier, arguments, fresh_accelerate, samples, trainer_of


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    with fresh_accelerate():
        yield


def test_what_is_no_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r'for example SAM\(rho=0.05\), got 0.05'):
        trainer_of(0.05, arguments(tmp_path), samples(1))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r'class SharpnessAwareMixin\(SharpnessAwareMixin, Trainer\)'):
        SharpnessAwareMixin(method=SAM())


def test_an_optimizer_that_is_wrapped_already_is_refused(tmp_path: Path) -> None:
    model = Classifier()
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters()), SAM(), model)
    trainer = trainer_of(SAM(), arguments(tmp_path), samples(1), model, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match='the optimizer is wrapped already'):
        trainer.train()


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'n_gpu': 2}, '2 GPUs in one process .* torchrun'),
        ({'deepspeed': True}, 'DeepSpeed takes the step itself'),
        ({'apex': True}, "half_precision_backend='apex' is not supported"),
        ({'optim': 'lomo'}, "optim='lomo' steps during the backward"),
        ({'optim': 'galore_adamw_layerwise'}, "optim='galore_adamw_layerwise' steps during the backward"),
    ],
)
def test_what_takes_the_step_itself_is_refused(values: dict[str, Any], message: str) -> None:
    found = {'n_gpu': 1, 'optim': 'adamw_torch', 'deepspeed': False, 'apex': False, **values}
    args = SimpleNamespace(n_gpu=found['n_gpu'], optim=found['optim'])
    with pytest.raises(ValueError, match=message):
        check_trainer(SimpleNamespace(args=args, is_deepspeed_enabled=found['deepspeed'], use_apex=found['apex']))


def test_a_trainer_that_generates_its_samples_is_refused(tmp_path: Path) -> None:
    grpo = type('GRPOTrainer', (Trainer,), {})
    mine = type('Mine', (SharpnessAwareMixin, grpo), {})
    with pytest.raises(ValueError, match='GRPOTrainer generates samples in its training step'):
        trainer_of(SAM(), arguments(tmp_path), samples(1), kind=mine)


def test_a_trainer_of_transformers_that_lacks_a_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Trainer, 'get_batch_samples')
    with pytest.raises(RuntimeError, match=r'has no get_batch_samples: use transformers 4.51 to 5.x'):
        check_class(Trainer)


BATCH = {'x': torch.zeros(2, 6), 'labels': torch.zeros(2, dtype=torch.long)}


class Bare(Trainer):
    """A Trainer with a training loop of its own, which tells callbacks nothing."""

    def train(self, *args: Any, **kwargs: Any) -> None:
        model: Any = self.model
        self.training_step(model, BATCH)


class Elsewhere(Trainer):
    """A Trainer that evaluates batches in other ways."""

    def train(self, *args: Any, **kwargs: Any) -> None:
        pass


class Own(Trainer):
    """A Trainer with a training loop of its own, which tells callbacks when it begins."""

    def train(self, *args: Any, **kwargs: Any) -> None:
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        model: Any = self.model
        self.training_step(model, BATCH)


class SharpBare(SharpnessAwareMixin, Bare): ...


class SharpElsewhere(SharpnessAwareMixin, Elsewhere): ...


class SharpOwn(SharpnessAwareMixin, Own): ...


@pytest.mark.parametrize(
    ('kind', 'what'),
    [
        (SharpBare, 'on_train_begin'),
        (SharpElsewhere, 'on_train_begin'),
        (SharpOwn, 'get_batch_samples and on_step_begin'),
    ],
)
def test_a_trainer_with_another_loop_does_not_train_without_the_method(
    kind: type[Any], what: str, tmp_path: Path
) -> None:
    trainer = trainer_of(SAM(), arguments(tmp_path), samples(1), kind=kind)
    with pytest.raises(RuntimeError, match=rf'{kind.__name__}.train\(\) of transformers .* without {what}'):
        trainer.train()

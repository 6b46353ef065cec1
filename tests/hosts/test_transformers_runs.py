"""Hugging Face's Trainer: runs that are stopped, fail, begin again or are watched by callbacks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip('transformers', reason="transformers is not installed: pip install 'composer-sam[transformers]'")
pytest.importorskip('accelerate', reason="accelerate is not installed: pip install 'composer-sam[transformers]'")

from composer_sam import SAM
from composer_sam.trainers.transformers import SharpnessAwareTrainer
from tests.hosts.small_trainers import (
    At,
    Classifier,
    arguments,
    assert_same_run,
    fresh_accelerate,
    samples,
    state_of,
    trainer_of,
)
from tests.problems import BASES, made, same, snapshot


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    with fresh_accelerate():
        yield


def test_callbacks_between_micro_batches_see_the_weights_w(tmp_path: Path) -> None:
    method, twin = made('MSAM'), Classifier()
    trainer = trainer_of(method, arguments(tmp_path, gradient_accumulation_steps=3), samples(9))
    before: list[Any] = []
    found: list[bool] = []

    def weights() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in trainer.model.parameters()]

    trainer.add_callback(At('on_step_begin', lambda *_: before.append(weights())))
    trainer.add_callback(At('on_substep_end', lambda *_: found.append(same(weights(), before[-1]))))
    assert_same_run(trainer, method, twin, BASES['SGD'](twin.parameters()))
    assert found == [True] * 6


def test_callbacks_that_draw_random_numbers_between_micro_batches_change_no_mask(tmp_path: Path) -> None:
    trainer = trainer_of(made('GAM'), arguments(tmp_path, gradient_accumulation_steps=3), samples(3))
    trainer.add_callback(At('on_substep_end', lambda *_: torch.rand(5)))
    masks: list[Tensor] = []
    dropout = next(module for module in trainer.model.modules() if isinstance(module, nn.Dropout))
    dropout.register_forward_hook(lambda _, inputs, output: masks.append(torch.eq(output, 0)))
    trainer.train()
    passes = [torch.stack(masks[first : first + 3]) for first in range(0, len(masks), 3)]
    assert len(passes) == made('GAM').passes
    assert all(torch.equal(passes[0], masks) for masks in passes)
    assert not torch.equal(passes[0][0], passes[0][1])


def test_every_pass_is_told_which_micro_batch_is_the_last(tmp_path: Path) -> None:
    told: list[bool] = []

    class Asking(SharpnessAwareTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            told.append(self.accelerator.sync_gradients)
            return super().compute_loss(*args, **kwargs)

    args = arguments(tmp_path, gradient_accumulation_steps=3)
    trainer_of(SAM(ascent_fraction=0.5), args, samples(3), kind=Asking).train()
    trainer_of(SAM(), args, samples(3), kind=Asking).train()
    assert told == [False, False, True] * 4


@pytest.mark.parametrize('name', ['SAM', 'MSAM'])
def test_a_run_that_is_stopped_in_the_middle_of_a_step_ends_at_w(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(made(name), arguments(tmp_path, gradient_accumulation_steps=2), samples(8))
    ends: list[Any] = []

    def stop(state: Any, control: Any) -> None:
        control.should_training_stop = state.global_step == 2

    def end(*_: Any) -> None:
        ends.append(copy.deepcopy(dict(trainer.model.named_parameters())))

    trainer.add_callback(At('on_substep_end', stop))
    trainer.add_callback(At('on_step_end', end))
    trainer.add_callback(At('on_train_end', end))
    trainer.train()
    assert len(ends) == 3
    assert same(ends[2], ends[1])
    assert trainer.sharpness_aware_optimizer.steps_taken == 2
    assert not trainer.sharpness_aware_optimizer.under_way


class Stream(torch.utils.data.IterableDataset):
    """Samples of unknown number."""

    def __init__(self, data: list[Any]):
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data)


def test_data_that_end_in_the_middle_of_a_step_are_not_evaluated_again(tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=4)
    trainer = trainer_of(SAM(rho=0.1), args, Stream(samples(5)), kind=SharpnessAwareTrainer)
    trainer.train()
    assert trainer.sharpness_aware_optimizer.steps_perturbed == trainer.state.global_step == 4
    # Steps have two micro-batches and two passes. The first epoch ends with a micro-batch that no step has.
    assert trainer.model.counted.forwards == 4 * 2 * 2 + 1


def test_where_the_data_end_in_the_middle_of_a_step_the_weights_w_are_evaluated(tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=4, eval_strategy='epoch')
    options: Any = {'kind': SharpnessAwareTrainer, 'eval_dataset': samples(1)}
    trainer = trainer_of(made('MSAM'), args, Stream(samples(5)), **options)
    ends: list[Any] = []

    def end(*_: Any) -> None:
        ends.append(copy.deepcopy(dict(trainer.model.named_parameters())))

    trainer.add_callback(At('on_step_end', end))
    trainer.add_callback(At('on_evaluate', end))
    trainer.train()
    assert len(ends) == 4 + 2
    assert same(ends[2], ends[1])
    assert same(ends[5], ends[4])


class Moving(torch.optim.SGD):
    """As schedule-free optimizers it moves the weights in ``eval`` and back in ``train``."""

    kept: list[Tensor] | None = None

    def eval(self) -> None:
        if self.kept is None:
            self.kept = [parameter.detach().clone() for parameter in self._parameters()]
            for parameter in self._parameters():
                parameter.data.zero_()

    def train(self) -> None:
        kept, self.kept = self.kept, None
        for parameter, place in zip(self._parameters(), kept or [], strict=False):
            parameter.data.copy_(place)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group['params']]


@pytest.mark.parametrize('name', ['SAM', 'MSAM'])
def test_an_optimizer_that_moves_the_weights_to_evaluate_moves_them_back_before_a_step(
    name: str, tmp_path: Path
) -> None:
    found: list[Any] = []
    for strategy in ('no', 'steps'):
        model = Classifier(dropout=0.0)
        optimizer = Moving(model.parameters(), lr=0.1, momentum=0.9)
        options: Any = {'optimizers': (optimizer, None), 'eval_dataset': samples(1, seed=7)}
        args = arguments(tmp_path, eval_strategy=strategy, eval_steps=1)
        trainer_of(made(name), args, samples(4), model, **options).train()
        optimizer.train()
        found.append(copy.deepcopy(model.state_dict()))
    assert same(*found)


# Errors.


@pytest.mark.parametrize(
    ('name', 'fault'),
    [
        *((name, MemoryError('no memory')) for name in ('SAM', 'MSAM', 'GAM', 'LookSAM')),
        ('SAM', KeyboardInterrupt()),
    ],
)
def test_an_error_in_any_forward_leaves_no_trace_and_training_goes_on(
    name: str, fault: BaseException, tmp_path: Path
) -> None:
    for at in range(1, 2 * made(name).passes + 1):
        trainer = trainer_of(made(name), arguments(tmp_path, gradient_accumulation_steps=2), samples(4))
        before: list[Any] = []
        assert isinstance(trainer.model, Classifier)
        counted = trainer.model.counted

        def arm(state: Any, _: Any, trainer: Any = trainer, before: list[Any] = before, at: int = at) -> None:
            if state.global_step == 1:
                before.append(snapshot(trainer.model, trainer.sharpness_aware_optimizer))
                trainer.model.counted.fail_at = trainer.model.counted.forwards + at

        trainer.add_callback(At('on_step_begin', arm))
        counted.fault = fault
        try:
            trainer.train()
        except type(fault):
            assert same(snapshot(trainer.model, trainer.sharpness_aware_optimizer), before[0]), f'forward {at}'
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
        else:
            assert at > 2  # the method's second step takes fewer passes
        trainer.remove_callback(At)
        counted.fail_at = -1
        trainer.train()
        assert trainer.sharpness_aware_optimizer.steps_taken == 2


@pytest.mark.parametrize('name', ['SAM', 'GAM'])
def test_an_error_between_the_passes_and_the_step_undoes_the_step(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(made(name), arguments(tmp_path), samples(2))
    before: list[Any] = []

    def note(*_: Any) -> None:
        before.append(snapshot(trainer.model, trainer.sharpness_aware_optimizer))

    def fail(state: Any, _: Any) -> None:
        if state.global_step == 1:
            raise MemoryError

    trainer.add_callback(At('on_step_begin', note))
    trainer.add_callback(At('on_pre_optimizer_step', fail))
    with pytest.raises(MemoryError):
        trainer.train()
    assert same(snapshot(trainer.model, trainer.sharpness_aware_optimizer), before[1])


class NeedsMemory(Classifier):
    """Runs out of memory with large batches, in the passes after the first."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if self.counted.forwards % 2 and len(x) > 8:
            raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')
        return super().forward(x, labels)


def test_a_smaller_batch_size_is_found_as_if_nothing_had_been_tried(tmp_path: Path) -> None:
    data = samples(4)
    args = arguments(tmp_path, auto_find_batch_size=True)
    trainer = trainer_of(SAM(rho=0.1), args, data, NeedsMemory(dropout=0.0))
    trainer.train()
    size = trainer._train_batch_size
    assert size <= 8
    args = arguments(tmp_path, per_device_train_batch_size=size)
    expected = trainer_of(SAM(rho=0.1), args, data, Classifier(dropout=0.0))
    expected.train()
    assert same(trainer.model.state_dict(), expected.model.state_dict())
    assert same(state_of(trainer.optimizer), state_of(expected.optimizer))


@pytest.mark.parametrize('name', ['SAM', 'LookSAM'])
def test_a_second_run_of_a_trainer_goes_on_from_the_weights_of_the_first(name: str, tmp_path: Path) -> None:
    method, twin = made(name), Classifier()
    base = BASES['SGD'](twin.parameters())
    trainer = trainer_of(method, arguments(tmp_path), samples(4))
    for _ in range(2):
        assert_same_run(trainer, method, twin, base)

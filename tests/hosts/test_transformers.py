"""Hugging Face's Trainer: its steps end in the bits of a plain loop, with all that changes what a step sees."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip('transformers', reason="transformers is not installed: pip install 'composer-sam[transformers]'")
pytest.importorskip('accelerate', reason="accelerate is not installed: pip install 'composer-sam[transformers]'")

from transformers import BatchEncoding, TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother

from composer_sam import SAM
from composer_sam.methods.base import SharpnessAware
from composer_sam.trainers.transformers import SharpnessAwareTrainer
from composer_sam.trainers.transformers.parts import first_samples
from tests.conformance.parts import METHODS
from tests.hosts.small_trainers import (
    SIZE,
    Classifier,
    Inputs,
    arguments,
    assert_same_run,
    base_of,
    counts_shifted_labels,
    fresh_accelerate,
    in_order,
    language_model,
    samples,
    sentences,
    trainer_of,
)
from tests.problems import BASES, made, part, same


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    with fresh_accelerate():
        yield


def whole_steps(name: str, **values: Any) -> SharpnessAware:
    """The method, perturbing every other step where all its steps are alike."""
    return made(name, **({} if name in ('LookSAM', 'AESAM') else {'interval': 2}), **values)


@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('name', METHODS)
def test_its_steps_are_those_of_a_plain_loop(name: str, accumulate: int, tmp_path: Path) -> None:
    method, twin = whole_steps(name), Classifier()
    args = arguments(tmp_path, gradient_accumulation_steps=accumulate)
    trainer = trainer_of(method, args, samples(6 * accumulate))
    assert_same_run(trainer, method, twin, BASES['SGD'](twin.parameters()))


@pytest.mark.parametrize('name', ['SAM', 'WSAM', 'GAM', 'LookSAM', 'MSAM', 'ASAM'])
def test_with_adamw_and_a_smaller_last_step(name: str, tmp_path: Path) -> None:
    method, twin = whole_steps(name), Classifier()
    trainer = trainer_of(method, arguments(tmp_path, gradient_accumulation_steps=3), samples(8), base='AdamW')
    assert_same_run(trainer, method, twin, BASES['AdamW'](twin.parameters()))


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('name', ['SAM', 'ASAM'])
def test_a_part_of_every_micro_batch_finds_the_perturbation(name: str, accumulate: int, tmp_path: Path) -> None:
    method, twin = made(name, ascent_fraction=0.4), Classifier()
    args = arguments(tmp_path, gradient_accumulation_steps=accumulate)

    def encoded(rows: Sequence[Inputs]) -> BatchEncoding:  # as tokenizers and DataCollatorWithPadding return it
        return BatchEncoding({name: torch.stack([row[name] for row in rows]) for name in rows[0]})

    trainer = trainer_of(method, args, samples(4 * accumulate), data_collator=encoded)
    assert_same_run(trainer, method, twin, BASES['SGD'](twin.parameters()))


def test_parameters_that_the_optimizer_does_not_have_are_clipped_by_one_pass(tmp_path: Path) -> None:
    method, twin, model = SAM(rho=0.1), Classifier(), Classifier()
    some = [BASES['SGD'](list(of.parameters())[:-2]) for of in (model, twin)]
    trainer = trainer_of(method, arguments(tmp_path), samples(3), model, optimizers=(some[0], None))
    assert_same_run(trainer, method, twin, some[1])


def test_the_first_samples_of_a_batch_are_those_of_all_its_entries() -> None:
    x, boxes = torch.arange(10).reshape(5, 2), [{'box': torch.zeros(n)} for n in range(5)]
    batch = {'x': x, 'boxes': boxes, 'more': {'mask': x[:, 0]}, 'weight': torch.tensor(2.0), 'name': 'a', 'none': None}
    found = first_samples(batch, 0.5)
    assert same(found['x'], x[:3])
    assert found['boxes'] == boxes[:3]
    assert same(found['more'], {'mask': x[:3, 0]})
    assert (found['weight'], found['name'], found['none']) == (torch.tensor(2.0), 'a', None)
    assert first_samples(batch, 1.0) is batch
    assert same(first_samples((x, x), 0.2), (x[:1], x[:1]))


def test_a_batch_whose_samples_are_joined_cannot_be_cut(tmp_path: Path) -> None:
    joined = {'input_ids': torch.zeros(1, 24), 'cu_seq_lens_q': torch.zeros(5)}
    with pytest.raises(ValueError, match=r'lengths are input_ids: 1, cu_seq_lens_q: 5. Pad the samples'):
        first_samples(joined, 0.5)
    with pytest.raises(ValueError, match='lengths are none in a list'):
        first_samples([{'x': torch.zeros(3)}], 0.5)


# Models of transformers.


def language_loss(model: nn.Module, inputs: Inputs, window: Sequence[Inputs]) -> Tensor:
    """The sum over all tokens of the step, divided by their number."""
    labels = [other['labels'][..., 1:] if counts_shifted_labels() else other['labels'] for other in window]
    items = torch.stack([(label != -100).sum() for label in labels]).sum()
    return model(**inputs, num_items_in_batch=items)['loss']


@pytest.mark.parametrize('values', [{}, {'ascent_fraction': 0.5}], ids=['whole', 'part'])
def test_a_language_model_counts_the_tokens_of_a_step(values: dict[str, Any], tmp_path: Path) -> None:
    # With such an epsilon the scale of the gradient counts, which is one by the number of tokens.
    method, twin = SAM(rho=0.1, epsilon=0.5, **values), language_model()
    args = arguments(tmp_path, gradient_accumulation_steps=3)
    kind = in_order(SharpnessAwareTrainer)
    trainer = trainer_of(method, args, sentences(8 * SIZE), language_model(), optimizers=(None, None), kind=kind)
    assert_same_run(trainer, method, twin, base_of(twin, args), loss_of=language_loss)


@pytest.mark.parametrize('reentrant', [True, False])
def test_recomputed_activations_change_no_bit(reentrant: bool, tmp_path: Path) -> None:
    method, twin, model = SAM(rho=0.1), language_model(), language_model()
    enable = getattr(model, 'activation_checkpointing_enable', model.gradient_checkpointing_enable)
    enable({'use_reentrant': reentrant})
    computed: list[nn.Module] = []
    part(model, 'transformer.h.1.mlp', nn.Module).register_forward_pre_hook(lambda module, _: computed.append(module))
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = trainer_of(method, args, sentences(4 * SIZE), model, optimizers=(None, None))
    assert_same_run(trainer, method, twin, base_of(twin, args), loss_of=language_loss)
    assert len(computed) == 4 * method.passes * 2


def test_a_language_models_outputs_can_be_watched(tmp_path: Path) -> None:
    method, twin = made('FunctionalSAM'), language_model()
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = trainer_of(method, args, sentences(4 * SIZE), language_model(), optimizers=(None, None))
    assert_same_run(trainer, method, twin, base_of(twin, args), loss_of=language_loss)


# What the Trainer does with a loss.


@pytest.mark.parametrize('name', ['SAM', 'FunctionalSAM'])
def test_label_smoothing_takes_the_labels_in_every_pass(name: str, tmp_path: Path) -> None:
    method, twin, model = made(name), Classifier(), Classifier()
    model.config = SimpleNamespace()  # pyright: ignore  # transformers 5 looks into it
    args = arguments(tmp_path, gradient_accumulation_steps=2, label_smoothing_factor=0.2)
    trainer = trainer_of(method, args, samples(6), model)
    smoother = LabelSmoother(epsilon=0.2)

    def smoothed(model: nn.Module, inputs: Inputs, window: Sequence[Inputs]) -> Tensor:
        return smoother(model(inputs['x']), inputs['labels']) / len(window)

    assert_same_run(trainer, method, twin, BASES['SGD'](twin.parameters()), loss_of=smoothed)


def test_a_loss_function_of_ones_own_is_evaluated_in_every_pass(tmp_path: Path) -> None:
    def loss_of(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs['logits'], labels, reduction='sum') / num_items_in_batch

    def in_the_loop(model: nn.Module, inputs: Inputs, window: Sequence[Inputs]) -> Tensor:
        items = torch.tensor(sum(len(other['labels']) for other in window))
        return loss_of(model(inputs['x']), inputs['labels'], items)

    method, twin = SAM(rho=0.1), Classifier()
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = trainer_of(method, args, samples(5), compute_loss_func=loss_of)
    assert_same_run(trainer, method, twin, BASES['SGD'](twin.parameters()), loss_of=in_the_loop)


# transformers 4 uses an old name of torch's.
@pytest.mark.filterwarnings('ignore:.*torch.cpu.amp.autocast.*is deprecated:FutureWarning')
@pytest.mark.parametrize('name', ['SAM', 'GAM'])
def test_bfloat16_is_that_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    def loss_of(model: nn.Module, inputs: Inputs, window: Sequence[Inputs]) -> Tensor:
        with torch.autocast('cpu', torch.bfloat16):
            return model(**inputs)['loss'] / len(window)

    method, twin = made(name), Classifier()
    trainer = trainer_of(method, arguments(tmp_path, gradient_accumulation_steps=2, bf16=True), samples(6))
    assert_same_run(trainer, method, twin, BASES['SGD'](twin.parameters()), loss_of=loss_of)


# transformers 4 uses an old name of torch's.
@pytest.mark.filterwarnings('ignore:.*torch.cpu.amp.autocast.*is deprecated:FutureWarning')
def test_outputs_that_are_converted_can_be_watched_by_a_loss_outside_of_the_model_only(tmp_path: Path) -> None:
    def loss_of(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs['logits'], labels)

    args = arguments(tmp_path, bf16=True)
    trainer = trainer_of(made('FunctionalSAM'), args, samples(2))
    with pytest.raises(ValueError, match=r'With bf16=True Accelerate returns float32 copies .*compute_loss_func'):
        trainer.train()
    trainer = trainer_of(made('FunctionalSAM'), args, samples(2), compute_loss_func=loss_of)
    trainer.train()
    assert trainer.sharpness_aware_optimizer.steps_perturbed == 2


# When steps are perturbed.


class Perturbed(TrainerCallback):
    """Notes after every step how many steps were perturbed."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.counts: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counts.append(self.trainer.sharpness_aware_optimizer.steps_perturbed)


def perturbed_steps(method: SharpnessAware, args: Any, steps: int) -> list[int]:
    trainer = trainer_of(method, args, samples(steps * args.gradient_accumulation_steps))
    noted = Perturbed()
    noted.trainer = trainer
    trainer.add_callback(noted)
    trainer.train()
    return [number for number, count in enumerate(noted.counts) if count > ([0, *noted.counts])[number]]


@pytest.mark.parametrize(
    ('values', 'epochs', 'expected'),
    [
        ({'start': '4ba'}, 2, [4, 5, 6, 7]),
        ({'start': '1ep'}, 2, [4, 5, 6, 7]),
        ({'end': '1ep', 'interval': 2}, 2, [1, 3]),
        ({'start': '0.5dur', 'interval': 3}, 2, [5]),
        ({'start': '0.25dur', 'end': '0.75dur'}, 2, [2, 3, 4, 5]),
        # 1ep is 0.8 of this run of one epoch and a quarter, which the Trainer counts as two.
        ({'start': '0.6dur', 'end': '1ep'}, 1.25, [3]),
    ],
)
def test_start_and_end_are_in_steps_epochs_and_parts_of_the_run(
    values: dict[str, Any], epochs: float, expected: list[int], tmp_path: Path
) -> None:
    args = arguments(tmp_path, num_train_epochs=epochs, gradient_accumulation_steps=2)
    assert perturbed_steps(SAM(**values), args, 4) == expected


def test_a_run_without_a_perturbed_step_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, 'composer_sam'):
        assert perturbed_steps(SAM(start='9ba'), arguments(tmp_path), 2) == []
    assert "start='9ba' is never reached in a run of 2 steps" in caplog.text
    assert "SAM(start='9ba') perturbed none of the 2 steps that were taken: they were plain steps of SGD" in caplog.text


def test_bounds_that_a_trainer_cannot_measure_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"start='9tok' needs a Composer Trainer .* '500ba' or '10ep' or '0.8dur'"):
        trainer_of(SAM(start='9tok'), arguments(tmp_path), samples(1))
    trainer = trainer_of(SAM(start='0.9dur', end='1ba'), arguments(tmp_path), samples(2))
    with pytest.raises(ValueError, match='start must lie before end'):
        trainer.train()

"""Lightning's automatic optimization ends in the bits of a plain loop over passes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip('lightning.pytorch', reason="lightning is not installed: pip install 'composer-sam[lightning]'")


from composer_sam import SAM, SharpnessAwareOptimizer
from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.split_step import SplitOptimizer
from composer_sam.engine.step import Step
from composer_sam.trainers.batches import MicroBatches
from composer_sam.trainers.lightning import SharpnessAware
from composer_sam.vectors import axpy
from tests.conformance.parts import METHODS, loss_of
from tests.hosts.small_fits import (
    Batch,
    Loader,
    Module,
    assert_same_run,
    by_passes,
    fitted,
    half,
    parameters_of,
    scaled,
    state_of,
    trainer,
    wrapped,
)
from tests.problems import BASES, batches, made, network, same


@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('name', METHODS)
def test_its_steps_are_those_of_a_plain_loop(tmp_path: Path, name: str, accumulate: int) -> None:
    values: dict[str, Any] = {} if name in ('LookSAM', 'AESAM') else {'interval': 2}
    assert_same_run(tmp_path, made(name, **values), batches(6 * accumulate), accumulate)


def test_with_adamw_and_a_smaller_last_step(tmp_path: Path) -> None:
    assert_same_run(tmp_path, SAM(rho=0.1), batches(8), 3, 'AdamW')


def test_the_trainer_tells_a_method_the_length_of_the_run(tmp_path: Path) -> None:
    data = batches(6)
    model, _, _ = by_passes(made('AESAM', total_steps=3), data, 2)
    module, _, _ = fitted(tmp_path, made('AESAM', total_steps=None), data, accumulate_grad_batches=2)
    assert same(module.net.state_dict(), model.state_dict())


@pytest.mark.parametrize('name', ['SAM', 'ASAM'])
def test_a_part_of_the_batch_finds_the_perturbation(tmp_path: Path, name: str) -> None:
    assert_same_run(tmp_path, made(name, ascent_fraction=0.4), batches(4))


def test_every_pass_goes_through_all_micro_batches_and_clipping_is_done_once(tmp_path: Path) -> None:
    class Clips(Module):
        clipped = 0

        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            self.clipped += 1
            super().configure_gradient_clipping(*args, **kwargs)

    module, _, _ = fitted(tmp_path, made('GAM'), batches(6), Clips(), accumulate_grad_batches=3)
    assert module.notes.forwards == 6 * made('GAM').passes
    assert module.clipped == 2


@pytest.mark.parametrize('name', ['SAM', 'GAM', 'MSAM', 'LookSAM'])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_16_mixed_scales_and_unscales_every_pass(tmp_path: Path, name: str, accumulate: int) -> None:
    data, method = batches(6 * accumulate), made(name, interval=1 if name == 'LookSAM' else 2)
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0, growth_interval=2)
    model, optimizer, losses = by_passes(method, data, accumulate, autocast=torch.half, scaler=scaler)
    plugin = half(1024.0)
    module, callback, _ = fitted(tmp_path, method, data, plugins=[plugin], accumulate_grad_batches=accumulate)
    assert same(module.net.state_dict(), model.state_dict())
    assert same(wrapped(callback).state_dict(), optimizer.state_dict())
    assert same(module.notes.losses, losses)
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == scaler.get_scale() == 1024.0 * 2**3


@pytest.mark.parametrize(
    ('values', 'bad'),
    [({}, 1), ({}, 2), ({'ascent_fraction': 0.5}, 1), ({'ascent_fraction': 0.5}, 2), ({'interval': 2}, 1)],
)
def test_an_overflow_in_any_pass_skips_the_step_and_lowers_the_scale(
    tmp_path: Path, values: dict[str, Any], bad: int
) -> None:
    class Overflows(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if self.notes.forwards == before + bad else loss

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.trainer.optimizers[0]
            states.append((parameters_of(self), state_of(optimizer)))

    before = 3 if 'interval' in values else 4  # forwards of the two steps before the one that overflows
    states: list[tuple[list[Tensor], Any]] = []
    plugin = half(1024.0)
    module, callback, run = fitted(tmp_path, SAM(rho=0.1, **values), batches(4), Overflows(), plugins=[plugin])
    assert same(states[2], states[3])
    assert not same(states[1], states[2])
    assert not same(states[3][0], parameters_of(module))
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 1024.0  # doubled after two steps, halved after the third
    assert wrapped(callback).steps_taken == 3
    assert run.global_step == 4  # as Lightning counts


def test_bf16_mixed(tmp_path: Path) -> None:
    data, method = batches(6), made('GSAM')
    model, _, losses = by_passes(method, data, 2, autocast=torch.bfloat16)
    module, _, _ = fitted(tmp_path, method, data, precision='bf16-mixed', accumulate_grad_batches=2)
    assert same(module.net.state_dict(), model.state_dict())
    assert same(module.notes.losses, losses)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_loss_that_is_not_finite_skips_the_step_where_that_is_asked_for(tmp_path: Path, accumulate: int) -> None:
    data = batches(3 * accumulate)
    data[accumulate] = data[accumulate][0] * torch.nan, data[accumulate][1]
    method = SAM(rho=0.1, on_nonfinite='skip')
    model, optimizer, _ = by_passes(method, data, accumulate)
    module, callback, _ = fitted(tmp_path, method, data, accumulate_grad_batches=accumulate)
    assert same(module.net.state_dict(), model.state_dict())
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert wrapped(callback).steps_taken == optimizer.steps_taken == 2


@pytest.mark.filterwarnings('ignore:`training_step` returned `None`:UserWarning')
@pytest.mark.parametrize('none', [-1, 1])
@pytest.mark.parametrize('name', ['MSAM', 'DPSAT', 'SAM'])
def test_validation_between_micro_batches_sees_w(tmp_path: Path, name: str, none: int) -> None:
    class Validates(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 3 == none else loss

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            seen.append(parameters_of(self))
            self.log('validated', loss_of(self, batch))

    seen: list[list[Tensor]] = []
    data = batches(9)
    model, _, _ = by_passes(made(name), data, 3)
    module = Validates()
    callback = SharpnessAware(made(name))
    run = trainer(tmp_path, callback, accumulate_grad_batches=3, val_check_interval=1, num_sanity_val_steps=0)
    run.fit(module, Loader(data), Loader(data[:1]))
    assert same(module.net.state_dict(), model.state_dict()) == (none < 0)
    assert len(seen) == 9
    for step in range(2):  # after two micro-batches of a step, and the last one of the step before
        assert same(seen[3 * step + 2], seen[3 * step + 3])
        assert same(seen[3 * step + 2], seen[3 * step + 4])
        assert not same(seen[3 * step + 2], seen[3 * step + 5])


def test_loading_that_draws_random_numbers_changes_no_mask(tmp_path: Path) -> None:
    module, masks = Module(), list[Tensor]()
    module.net[3].register_forward_hook(lambda _, inputs, output: masks.append(torch.eq(output, 0)))
    fitted(tmp_path, made('GAM'), Loader(batches(6), lambda: torch.rand(5)), module, accumulate_grad_batches=3)
    passes = [torch.stack(masks[first : first + 3]) for first in range(0, len(masks), 3)]
    steps = passes[: made('GAM').passes], passes[made('GAM').passes :]
    assert all(torch.equal(step[0], masks) for step in steps for masks in step)
    assert not torch.equal(steps[0][0], steps[1][0])
    assert not torch.equal(passes[0][0], passes[0][1])


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_batch_that_is_changed_in_place_is_changed_once_per_pass(tmp_path: Path, accumulate: int) -> None:
    class Doubles(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            batch[0].mul_(2)
            return super().training_step(batch, batch_idx)

    data = batches(4)
    model, _, _ = by_passes(made('GAM'), [(2 * x, y) for x, y in data], accumulate)
    module, _, _ = fitted(tmp_path, made('GAM'), copy.deepcopy(data), Doubles(), accumulate_grad_batches=accumulate)
    assert same(module.net.state_dict(), model.state_dict())


@pytest.mark.filterwarnings('ignore:`training_step` returned `None`:UserWarning')
@pytest.mark.parametrize('skipped', [(1,), (0, 1), (3, 4), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize('amp', [False, True])
def test_micro_batches_without_a_loss_are_left_out(tmp_path: Path, skipped: tuple[int, ...], amp: bool) -> None:
    class Skips(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return None if batch_idx in skipped else super().training_step(batch, batch_idx)

    data, method = batches(6), made('GSAM')
    torch.manual_seed(3)
    model = network(dropout=0.0)
    base = BASES['SGD'](model.parameters())
    optimizer = SharpnessAwareOptimizer(base, method, model)
    for step in range(3):
        left = [data[place] for place in (2 * step, 2 * step + 1) if place not in skipped]
        if left and not (
            amp and 2 * step + 1 in skipped
        ):  # at 16-mixed Lightning steps only if the last one has a loss
            for _ in optimizer.passes():
                for batch in left:
                    (loss_of(model, batch) / 2).backward()
    module = Skips(dropout=0.0)
    options: dict[str, Any] = {'plugins': [scaled(1024.0)]} if amp else {}
    _, callback, _ = fitted(
        tmp_path, method, data, module, accumulate_grad_batches=2, gradient_clip_val=None, **options
    )
    assert same(parameters_of(module.net), parameters_of(model))
    assert wrapped(callback).steps_taken == optimizer.steps_taken


def test_a_window_that_the_module_leaves_without_a_step_is_given_up(tmp_path: Path) -> None:
    class StepsRarely(Module):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    data = batches(6)
    torch.manual_seed(3)
    model = network()
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), made('GAM'), model)
    for place, batch in enumerate(data):
        if place % 2 == 0:
            loss_of(model, batch)  # buffers and random numbers are as after it
            continue
        for _ in optimizer.passes():
            optimizer.zero_grad()
            loss_of(model, batch).backward()
    module, callback, _ = fitted(tmp_path, made('GAM'), data, StepsRarely(), gradient_clip_val=None)
    assert same(module.net.state_dict(), model.state_dict())
    assert wrapped(callback).steps_taken == 3


def test_an_optimizer_step_may_call_the_closure_itself(tmp_path: Path) -> None:
    class CallsIt(Module):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer_closure()
            optimizer.step()

    model, _, _ = by_passes(made('GAM'), batches(4), 2)
    module, _, _ = fitted(tmp_path, made('GAM'), batches(4), CallsIt(), accumulate_grad_batches=2)
    assert same(module.net.state_dict(), model.state_dict())


def test_steps_that_are_not_perturbed_keep_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(MicroBatches, 'see', lambda self, batch: kept.append(batch))
    fitted(tmp_path, made('MSAM', interval=2), batches(8), accumulate_grad_batches=2)
    assert [batch_idx for _, batch_idx in kept] == [2, 3, 6, 7]


def test_weights_are_put_back_between_micro_batches_and_not_after_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[int] = []
    pause = SplitOptimizer.pause
    monkeypatch.setattr(SplitOptimizer, 'pause', lambda self: (paused.append(self.steps_taken), pause(self)))
    fitted(tmp_path, made('MSAM'), batches(6), accumulate_grad_batches=3)
    assert paused == [0, 0, 1, 1]


@dataclass(eq=False)
class Curved(SAM):
    """A rule that differentiates its second gradient again."""

    @property
    def backwards_create_graph(self) -> bool:
        return True

    def direction(self, step: Step) -> Passes:
        first = yield Pass(graph=True)
        first, _ = step.hessian_product(first, step.weights())
        second = yield Pass(at=step.offset(first, self.rho, self.epsilon), graph=True)
        second, product = step.hessian_product(second, step.weights())
        return Direction(axpy(0.1, product, second))


def test_any_pass_may_be_differentiated_again(tmp_path: Path) -> None:
    assert_same_run(tmp_path, Curved(rho=0.1), batches(6), 3)

"""Hugging Face Accelerate: its loop ends in the bits of a plain one; checkpoints, scaler and schedulers work."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

pytest.importorskip('accelerate', reason="accelerate is not installed: pip install 'composer-sam[accelerate]'")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from composer_sam import SAM
from composer_sam.methods.base import SharpnessAware
from composer_sam.trainers.accelerate import SharpnessAwareSteps
from tests.conformance.parts import CLIP, METHODS, by_passes, loss_of
from tests.problems import BASES, batches, made, network, same, snapshot

Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps its state in classes."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def schedule(base: torch.optim.Optimizer) -> torch.optim.lr_scheduler.StepLR:
    return torch.optim.lr_scheduler.StepLR(base, 2, 0.5)


class Run:
    """A loop as a user writes it. ``scaler`` is put where Accelerate puts its own, which it makes on GPUs only."""

    def __init__(
        self,
        method: SharpnessAware,
        accumulate: int = 1,
        base: str = 'SGD',
        scaler: torch.amp.GradScaler | None = None,
        total_steps: int | None = None,
    ):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        self.accelerator.scaler = scaler
        model = network()
        made_base = BASES[base](model.parameters())
        scheduler = schedule(made_base)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, made_base, scheduler)
        if scaler is not None:  # so that clip_grad_norm_ unscales
            self.accelerator.native_amp = True
            self.accelerator.state._mixed_precision = 'fp16'
        self.steps = SharpnessAwareSteps(self.accelerator, method, self.model, self.optimizer, total_steps=total_steps)
        self.losses: list[Tensor] = []

    def fit(self, data: Sequence[Batch]) -> Run:
        for step in self.steps(data):
            for batch in step:
                loss = loss_of(self.model, batch)
                self.accelerator.backward(loss, create_graph=self.steps.optimizer.method.backwards_create_graph)
                if step.counts:
                    self.losses.append(loss.detach() / self.accelerator.gradient_accumulation_steps)
            self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return self


def assert_same_run(method: SharpnessAware, data: Sequence[Batch], accumulate: int, base: str = 'SGD') -> Run:
    model, optimizer, losses = by_passes(method, data, accumulate, base, schedule=schedule)
    end = torch.get_rng_state()
    torch.manual_seed(3)
    run = Run(method, accumulate, base).fit(data)
    assert same(run.model.state_dict(), model.state_dict())
    assert same(run.optimizer.state_dict(), optimizer.state_dict())
    assert same(run.losses, losses)
    assert torch.equal(torch.get_rng_state(), end)
    assert run.steps.optimizer.steps_perturbed == optimizer.steps_perturbed > 0
    return run


@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('name', METHODS)
def test_its_steps_are_those_of_a_plain_loop(name: str, accumulate: int) -> None:
    values: dict[str, Any] = {} if name in ('LookSAM', 'AESAM') else {'interval': 2}
    assert_same_run(made(name, **values), batches(6 * accumulate), accumulate)


def test_with_adamw_and_a_smaller_last_step() -> None:
    run = assert_same_run(SAM(rho=0.1), batches(8), 3, 'AdamW')
    assert run.steps.optimizer.steps_taken == 3


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_part_of_every_micro_batch_finds_the_perturbation(accumulate: int) -> None:
    assert_same_run(SAM(rho=0.1, ascent_fraction=0.4), batches(4 * accumulate), accumulate)


def test_a_prepared_loader_gives_whole_steps() -> None:
    run = Run(SAM(rho=0.1), accumulate=2)
    loader = run.accelerator.prepare(DataLoader(torch.utils.data.TensorDataset(torch.arange(20.0)), batch_size=4))
    sizes: list[list[int]] = []
    passes: list[list[float]] = []
    for step in run.steps(loader):
        sizes.append([len(batch) for (batch,) in step.batches])
        passes.append([])
        for (batch,) in step:
            passes[-1].append(batch.sum().item())
            run.accelerator.backward(run.model(batch[:, None].expand(-1, 6)).square().mean())
        run.optimizer.step()
    assert sizes == [[4, 4], [4, 4], [4]]
    assert passes == [[6.0, 22.0] * 2, [38.0, 54.0] * 2, [70.0] * 2]


def test_in_place_changes_of_a_batch_are_not_repeated() -> None:
    run = Run(SAM(rho=0.1))
    seen: list[float] = []
    for step in run.steps([torch.ones(4, 6)]):
        for batch in step:
            seen.append(batch.sum().item())
            run.accelerator.backward(run.model(batch.mul_(2)).square().mean())
        run.optimizer.step()
    assert seen == [24.0, 24.0]


def test_its_scaler_changes_no_bit() -> None:
    data = batches(8)
    torch.manual_seed(3)
    plain = Run(SAM(rho=0.1, interval=2), 2).fit(data)
    torch.manual_seed(3)
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0, growth_interval=2)
    scaled = Run(SAM(rho=0.1, interval=2), 2, scaler=scaler).fit(data)
    assert same(scaled.model.state_dict(), plain.model.state_dict())
    assert scaler.get_scale() == 4096.0


@pytest.mark.parametrize('bad', [1, 2])
def test_an_overflow_in_any_pass_skips_the_step_and_the_schedule(bad: int) -> None:
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
    run = Run(SAM(rho=0.1), scaler=scaler).fit(batches(1))
    before, rate = copy.deepcopy(dict(run.model.named_parameters())), run.scheduler.get_last_lr()
    seen: list[int] = []

    def overflow(gradient: Tensor) -> Tensor:
        seen.append(1)
        return gradient * torch.inf if len(seen) == bad else gradient

    handle = next(run.model.parameters()).register_hook(overflow)
    run.fit(batches(1))
    handle.remove()
    assert same(dict(run.model.named_parameters()), before)
    assert run.optimizer.step_was_skipped
    assert scaler.get_scale() == 512.0
    assert run.scheduler.get_last_lr() == rate
    run.fit(batches(2))
    assert run.steps.optimizer.steps_taken == 3
    assert run.scheduler.get_last_lr() != rate


@pytest.mark.parametrize('how', ['error', 'break', 'error after the passes'])
@pytest.mark.parametrize('name', ['SAM', 'MSAM', 'GAM'])
def test_a_step_that_is_left_leaves_no_trace(name: str, how: str) -> None:
    run = Run(made(name), accumulate=2).fit(batches(2))
    before = snapshot(run.model, run.optimizer)
    forwards = 0
    try:
        for step in run.steps(batches(2)):
            for batch in step:
                forwards += 1
                run.accelerator.backward(loss_of(run.model, batch))
                if how == 'break' and forwards == 2 * made(name).passes:
                    break
                if how == 'error' and forwards == 2 * made(name).passes:
                    raise MemoryError
            if how != 'break':
                raise MemoryError
            break
    except MemoryError:
        pass
    del step
    before['steps'] = None
    assert same(snapshot(run.model, run.optimizer), before)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert run.accelerator.sync_gradients
    assert run.fit(batches(2)).steps.optimizer.steps_taken == 2


@pytest.mark.parametrize('name', ['SAM', 'WSAM', 'GAM', 'MSAM'])
def test_a_resumed_run_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    data = batches(14)
    torch.manual_seed(3)
    whole = Run(made(name, interval=3), 2).fit(data)
    torch.manual_seed(3)
    first = Run(made(name, interval=3), 2)
    first.accelerator.register_for_checkpointing(first.steps)
    first.fit(data[:8])
    first.accelerator.save_state(str(tmp_path))
    torch.manual_seed(99)
    second = Run(made(name, interval=3), 2)
    second.accelerator.register_for_checkpointing(second.steps)
    second.accelerator.load_state(str(tmp_path))
    second.fit(data[8:])
    assert same(second.model.state_dict(), whole.model.state_dict())
    assert same(second.optimizer.state_dict(), whole.optimizer.state_dict())
    assert second.steps.optimizer.steps_taken == whole.steps.optimizer.steps_taken == 7


def test_a_part_of_the_run_needs_its_length() -> None:
    with pytest.raises(ValueError, match=r"start='0.5dur' needs a Composer Trainer .* '500ba'"):
        Run(SAM(start='0.5dur'))
    run = Run(SAM(start='0.5dur'), total_steps=4).fit(batches(4))
    assert run.steps.optimizer.steps_perturbed == 2


def test_what_cannot_be_used_is_refused() -> None:
    run = Run(SAM())
    with pytest.raises(ValueError, match='the optimizer is wrapped already'):
        SharpnessAwareSteps(run.accelerator, SAM(), run.model, run.optimizer)
    with pytest.raises(TypeError, match='accelerator.prepare'):
        SharpnessAwareSteps(run.accelerator, SAM(), run.model, torch.optim.SGD(run.model.parameters()))  # pyright: ignore
    run.accelerator.backward(loss_of(run.model, batches(1)[0]))
    with pytest.raises(ValueError, match='without a forward that the adapter has seen'):
        run.optimizer.step()

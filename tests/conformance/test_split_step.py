"""The split step, by a small trainer that evaluates one pass, clips and steps by itself, as other libraries' do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composer_sam import SAM
from composer_sam.engine.pass_number import PassNumber
from composer_sam.engine.rule import Pass
from composer_sam.engine.split_step import SplitOptimizer
from composer_sam.methods.base import SharpnessAware
from composer_sam.trainers.batches import MicroBatches
from composer_sam.trainers.host import Length, SplitHost, TrainerMoment
from tests.conformance.parts import CLIP, METHODS, by_passes, loss_of
from tests.problems import BASES, batches, made, network, same, snapshot, with_all_passes

Batch = tuple[Tensor, Tensor]
CPU = frozenset({torch.device('cpu')})


class Trainer:
    """A trainer that knows no closures. ``between`` is called before every micro-batch but a step's first."""

    def __init__(
        self,
        method: SharpnessAware,
        accumulate: int,
        base: str = 'SGD',
        clip: float | None = CLIP,
        scaler: torch.amp.GradScaler | None = None,
        between: Callable[[], object] = lambda: None,
    ):
        self.steps = 0
        self.model = network()
        host = SplitHost(lambda _: TrainerMoment(self.steps, 0, Length(None, None)))
        self.optimizer = SplitOptimizer(BASES[base](self.model.parameters()), method, self.model, scaler, host=host)
        self.accumulate, self.clip, self.scaler, self.between = accumulate, clip, scaler, between
        self.losses: list[Tensor] = []
        self.fail_at = -1
        self.forwards = 0

    def fit(self, data: Sequence[Batch]) -> Trainer:
        for first in range(0, len(data), self.accumulate):
            self.step(data[first : first + self.accumulate])
        return self

    def step(self, window: Sequence[Batch]) -> None:
        seen, whole = MicroBatches(CPU), MicroBatches(CPU)
        for batch in window:
            whole.expect(batch)
        total = torch.zeros(())
        request = Pass()
        for number, batch in enumerate(window):
            if number > 0:
                self.optimizer.pause()
                self.between()
                self.optimizer.resume()
            seen.see(batch)
            if number == 0:
                request = self.optimizer.begin(lambda r: self._evaluate(whole, r))
            self.losses.append(self._backward(batch, request))
            total += self.losses[-1]
        self.optimizer.finish_passes(total, lambda r: self._evaluate(seen, r))
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def _evaluate(self, seen: MicroBatches, request: Pass) -> Tensor:
        self.optimizer.zero_grad()
        part = PassNumber(0, request.fraction).part
        return torch.stack([self._backward(part(batch), request) for batch in seen.again()]).sum()

    def _backward(self, batch: Batch, request: Pass) -> Tensor:
        self.forwards += 1
        if self.forwards == self.fail_at:
            raise MemoryError('no memory')
        loss = loss_of(self.model, batch) / self.accumulate
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward(create_graph=request.graph)  # pyright: ignore[reportAttributeAccessIssue]
        return loss.detach()


@pytest.mark.parametrize('base', list(BASES))
@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('name', METHODS)
def test_a_trainers_steps_are_those_of_a_loop_over_passes(name: str, accumulate: int, base: str) -> None:
    values: dict[str, Any] = {} if name in ('LookSAM', 'AESAM') else {'interval': 2}
    data = batches(6 * accumulate)
    model, optimizer, losses = by_passes(made(name, **values), data, accumulate, base)
    end = torch.get_rng_state()
    torch.manual_seed(3)
    trainer = Trainer(made(name, **values), accumulate, base).fit(data)
    assert same(trainer.model.state_dict(), model.state_dict())
    assert same(trainer.optimizer.state_dict(), optimizer.state_dict())
    assert same(trainer.losses, losses)
    assert torch.equal(torch.get_rng_state(), end)
    assert trainer.optimizer.steps_perturbed == optimizer.steps_perturbed > 0


@pytest.mark.parametrize('name', ['SAM', 'ASAM'])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_part_of_every_micro_batch_finds_the_perturbation(name: str, accumulate: int) -> None:
    data = batches(4 * accumulate)
    method = made(name, ascent_fraction=0.4)
    model, _, losses = by_passes(method, data, accumulate)
    torch.manual_seed(3)
    trainer = Trainer(method, accumulate).fit(data)
    assert same(trainer.model.state_dict(), model.state_dict())
    assert same(trainer.losses, losses)


@pytest.mark.parametrize('name', METHODS)
def test_between_micro_batches_the_weights_are_at_w(name: str) -> None:
    seen: list[bool] = []
    trainer = Trainer(
        made(name), 3, between=lambda: seen.append(same(before, [p.detach() for p in trainer.model.parameters()]))
    )
    data = batches(9)
    for step in range(3):
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        trainer.step(data[3 * step : 3 * step + 3])
    assert seen == [True] * 6


def test_loading_between_micro_batches_changes_no_mask() -> None:
    masks: list[Tensor] = []
    trainer = Trainer(made('GAM'), 3, between=lambda: torch.rand(5))
    dropout = next(module for module in trainer.model.modules() if isinstance(module, nn.Dropout))
    dropout.register_forward_hook(lambda _, inputs, output: masks.append(torch.eq(output, 0)))
    trainer.fit(batches(3))
    passes = [torch.stack(masks[first : first + 3]) for first in range(0, len(masks), 3)]
    assert len(passes) == made('GAM').passes
    assert all(torch.equal(passes[0], masks) for masks in passes)
    assert not torch.equal(passes[0][0], passes[0][1])


@pytest.mark.parametrize('name', [name for name in METHODS if not made(name).backwards_create_graph])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_scaler_of_the_trainers_own_changes_no_bit(name: str, accumulate: int) -> None:
    data = batches(6 * accumulate)
    torch.manual_seed(3)
    method = made(name, interval=1 if name in ('LookSAM', 'AESAM') else 2)
    plain = Trainer(method, accumulate).fit(data)
    torch.manual_seed(3)
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0, growth_interval=2)
    scaled = Trainer(method, accumulate, scaler=scaler).fit(data)
    assert same(scaled.model.state_dict(), plain.model.state_dict())
    assert scaler.get_scale() == 1024.0 * 2**3


@pytest.mark.parametrize('fraction', [1.0, 0.5])
@pytest.mark.parametrize('bad', [1, 2])
def test_an_overflow_in_any_pass_skips_the_step_and_lowers_the_scale(bad: int, fraction: float) -> None:
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
    trainer = Trainer(SAM(rho=0.1, ascent_fraction=fraction), 1, scaler=scaler)
    data = batches(2)
    trainer.fit(data[:1])
    weights, state = copy.deepcopy(dict(trainer.model.named_parameters())), snapshot(trainer.model, trainer.optimizer)
    forwards = trainer.forwards
    handle = next(trainer.model.parameters()).register_hook(
        lambda gradient: gradient * torch.inf if trainer.forwards == forwards + bad else gradient
    )
    trainer.fit(data[1:])
    handle.remove()
    assert same(dict(trainer.model.named_parameters()), weights)
    assert same(trainer.optimizer.state_dict(), state['optimizer'])
    assert scaler.get_scale() == 512.0
    assert trainer.optimizer.steps_taken == 1
    trainer.fit(data[1:])
    assert trainer.optimizer.steps_taken == 2


@pytest.mark.parametrize('name', METHODS)
def test_an_error_in_any_forward_of_a_step_leaves_no_trace(name: str) -> None:
    data = batches(4)
    for at in range(1, 2 * with_all_passes(name).passes + 1):
        trainer = Trainer(with_all_passes(name), 2).fit(data[:2])
        twin = copy.deepcopy(trainer.model.state_dict())
        before = snapshot(trainer.model, trainer.optimizer)
        trainer.fail_at = trainer.forwards + at
        try:
            trainer.fit(data[2:])
        except MemoryError:
            trainer.optimizer.abandon_step()  # what an adapter does when its trainer fails
            assert same(snapshot(trainer.model, trainer.optimizer), before), f'forward {at}'
            assert same(trainer.model.state_dict(), twin)
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
        else:
            assert at > 2  # the method's second step takes fewer passes


def test_an_error_between_the_passes_and_the_step_undoes_the_step() -> None:
    trainer = Trainer(SAM(rho=0.1), 1).fit(batches(1))
    before = snapshot(trainer.model, trainer.optimizer)
    trainer.clip = -1.0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(nn.utils, 'clip_grad_norm_', _no_memory)
        trainer.fit(batches(1))
    trainer.optimizer.abandon_step()
    assert same(snapshot(trainer.model, trainer.optimizer), before)


def _no_memory(*_: Any) -> None:
    raise MemoryError


def test_a_step_that_was_left_is_given_up_at_w_and_the_next_one_is_whole() -> None:
    data = batches(3)
    trainer = Trainer(made('MSAM', interval=1), 1).fit(data[:1])
    weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.optimizer.begin(lambda _: None)
    moved = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.optimizer.give_up()
    assert not same(moved, weights)
    assert same([parameter.detach() for parameter in trainer.model.parameters()], weights)
    assert not trainer.optimizer.under_way
    trainer.fit(data[1:])
    assert trainer.optimizer.steps_taken == 3


def test_a_step_that_was_not_begun_is_refused() -> None:
    trainer = Trainer(SAM(), 1)
    loss_of(trainer.model, batches(1)[0]).backward()
    with pytest.raises(ValueError, match='without a forward that the adapter has seen'):
        trainer.optimizer.step()


def test_a_nonfinite_loss_skips_the_step_where_that_is_asked_for() -> None:
    data = batches(2)
    trainer = Trainer(SAM(on_nonfinite='skip'), 1).fit(data[:1])
    before = snapshot(trainer.model, trainer.optimizer)
    x, y = data[1]
    trainer.fit([(x * torch.nan, y)])
    assert same(dict(trainer.model.state_dict()), before['model'])
    assert same(trainer.optimizer.state_dict(), before['optimizer'])
    assert trainer.optimizer.skipped
    trainer.fit(data[1:])
    assert trainer.optimizer.steps_taken == 2

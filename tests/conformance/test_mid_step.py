"""What can be saved and copied in the middle of a step, where the weights are perturbed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composer_sam import SAM, SharpnessAwareOptimizer
from tests.conformance.parts import EVERY_WAY, WAYS, flat, loss_of, take_step, wrap
from tests.problems import TWO_CALLS, batches, made, needs_graph, network, same, snapshot

# What is done in the middle of a step, with the optimizer and its model.
Act = Callable[[SharpnessAwareOptimizer, nn.Module], None]
DATA = batches(5)


def step_with(optimizer: SharpnessAwareOptimizer, model: nn.Module, way: str, act: Act) -> None:
    """Take one step on the third batch; ``act`` after the backward of every pass, and between two calls."""

    def backward() -> Tensor:
        loss = loss_of(model, DATA[2])
        loss.backward(create_graph=optimizer.method.backwards_create_graph)
        act(optimizer, model)
        return loss

    WAYS[way](optimizer, backward)


def begun(name: str, way: str, **values: Any) -> tuple[nn.Sequential, SharpnessAwareOptimizer]:
    """A network and its optimizer after two steps."""
    model = network()
    optimizer = wrap(model, made(name, **values), 'AdamW')
    torch.manual_seed(7)
    for batch in DATA[:2]:
        take_step(optimizer, model, batch, way)
    return model, optimizer


def finished(model: nn.Module, optimizer: SharpnessAwareOptimizer, way: str) -> dict[str, Any]:
    """The state after the last two batches."""
    for batch in DATA[3:]:
        take_step(optimizer, model, batch, way)
    return snapshot(model, optimizer)


def undisturbed(name: str, way: str) -> dict[str, Any]:
    model, optimizer = begun(name, way)
    take_step(optimizer, model, DATA[2], way)
    return finished(model, optimizer, way)


@pytest.mark.parametrize(('name', 'way'), EVERY_WAY)
def test_the_optimizers_state_is_that_of_before_the_step(name: str, way: str) -> None:
    """In every pass, and also of a method that keeps memory in it."""
    values = {'interval_hessian': 3} if needs_graph(name) else {}
    model, optimizer = begun(name, way, **values)
    before = copy.deepcopy(optimizer.state_dict())
    states: list[dict[str, Any]] = []
    step_with(optimizer, model, way, lambda optimizer, _: states.append(copy.deepcopy(optimizer.state_dict())))
    method = made(name)
    assert method.fewest_passes <= len(states) <= method.passes
    assert all(same(before, state) for state in states)
    assert not same(before, optimizer.state_dict())


@pytest.mark.parametrize('name', TWO_CALLS)
def test_between_the_two_calls_the_models_state_is_that_of_the_second_pass(name: str) -> None:
    """As with every SAM of two calls: a checkpoint belongs after second_step."""
    model, optimizer = begun(name, 'two calls')
    w = flat(model)
    optimizer.zero_grad()
    loss_of(model, DATA[2]).backward()
    optimizer.first_step(zero_grad=True)
    between = copy.deepcopy(model.state_dict())
    seen: list[Tensor] = []
    model.register_forward_hook(lambda *_: seen.append(flat(model)))
    loss_of(model, DATA[2]).backward()
    assert not torch.equal(seen[0], w)
    assert torch.equal(seen[0], torch.cat([between[n].reshape(-1) for n, _ in model.named_parameters()]))
    optimizer.abandon_step()
    assert torch.equal(w, flat(model))
    if name == 'SAM':
        torch.testing.assert_close((seen[0] - w).norm(), torch.tensor(0.05), rtol=1e-4, atol=0)


@pytest.mark.parametrize('what', ['optimizer', 'model', 'both'])
@pytest.mark.parametrize(('name', 'way'), EVERY_WAY)
def test_a_copy_in_the_middle_of_a_step_changes_nothing(name: str, way: str, what: str) -> None:
    def act(optimizer: SharpnessAwareOptimizer, model: nn.Module) -> None:
        copy.deepcopy({'optimizer': optimizer, 'model': model, 'both': (model, optimizer)}[what])

    model, optimizer = begun(name, way)
    step_with(optimizer, model, way, act)
    after = finished(model, optimizer, way)
    assert same(undisturbed(name, way), after)


@pytest.mark.parametrize(('name', 'way'), EVERY_WAY)
def test_a_copy_from_the_middle_of_a_step_has_no_step_under_way(name: str, way: str) -> None:
    """It takes steps of its own, from the state before the step and the weights of the pass; so does the original."""
    model, optimizer = begun(name, way)
    copies: list[tuple[nn.Module, SharpnessAwareOptimizer, dict[str, Tensor]]] = []

    def act(optimizer: SharpnessAwareOptimizer, model: nn.Module) -> None:
        if fewest == 1 or flat(model).ne(before).any():
            copies.append((*copy.deepcopy((model, optimizer)), copy.deepcopy(model.state_dict())))

    fewest = made(name).fewest_passes
    before, state, steps_taken = flat(model), copy.deepcopy(optimizer.state_dict()), optimizer.steps_taken
    step_with(optimizer, model, way, act)
    assert copies
    after = finished(model, optimizer, way)
    for copied_model, copied, weights in copies:
        assert copied.pass_index == -1
        assert copied.steps_taken == steps_taken
        assert same(state, copied.state_dict())
        assert same(weights, copied_model.state_dict())
        # A fresh network and optimizer with the same weights and state end where the copy ends.
        fresh = network()
        fresh.load_state_dict(weights)
        again = wrap(fresh, optimizer.method, 'AdamW')
        again.load_state_dict(copy.deepcopy(state))  # torch steps the tensors it is given
        again.steps_taken = steps_taken
        torch.manual_seed(8)
        expected = finished(fresh, again, way)
        torch.manual_seed(8)
        assert same(expected, finished(copied_model, copied, way))
    assert same({**after, 'random': None}, {**snapshot(model, optimizer), 'random': None})
    assert same(undisturbed(name, way), after)


@pytest.mark.parametrize('interval', [1, 2])
def test_a_copy_between_the_two_calls_has_no_step_to_finish(interval: int) -> None:
    """On a step that is perturbed and on one that is not."""
    model = network()
    optimizer = wrap(model, SAM(interval=interval))
    loss_of(model, DATA[0]).backward()
    optimizer.first_step(zero_grad=True)
    copied_model, copied = copy.deepcopy((model, optimizer))
    with pytest.raises(ValueError, match=r'first_step\(\) is missing'):
        copied.second_step()
    before = flat(copied_model)
    copied.abandon_step()  # there is none
    assert torch.equal(before, flat(copied_model))
    loss_of(model, DATA[0]).backward()
    optimizer.second_step()
    assert optimizer.steps_taken == 1


@pytest.mark.parametrize('way', ['loop', 'two calls'])
def test_a_step_that_the_garbage_collector_finds_open_leaves_the_random_streams_alone(way: str) -> None:
    """Others draw from them by then, and torch may hold the very stream's lock."""
    model, batch = network(), batches(1)[0]
    optimizer = wrap(model, SAM(rho=0.1))
    before = flat(model)
    held: list[Any] = [optimizer]
    if way == 'loop':
        held.append(optimizer.passes())
        next(held[1])
        loss_of(model, batch).backward()
        next(held[1])
    else:
        loss_of(model, batch).backward()
        optimizer.first_step(zero_grad=True)
    held.append(held)  # a cycle, which only the collector ends
    assert not torch.equal(flat(model), before)
    gc.disable()
    try:
        del held, optimizer
        expected = torch.rand(5, generator=torch.Generator().manual_seed(3))
        torch.manual_seed(3)
        with torch.no_grad():
            gc.collect()
            assert not torch.is_grad_enabled()
        assert torch.equal(torch.rand(5), expected)
    finally:
        gc.enable()
    assert torch.equal(flat(model), before)

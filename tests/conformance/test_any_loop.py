"""A loop that stays as it is: one line after its backward, bit for bit the loop over passes."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composer_sam import GAM, MSAM, SAM, LoopOptimizer
from composer_sam.methods.base import SharpnessAware
from tests.conformance.parts import CLIP, METHODS, by_passes, loss_of
from tests.problems import BASES, batches, made, network, same, snapshot

Batch = tuple[Tensor, Tensor]


def steps(
    optimizer: LoopOptimizer,
    model: Callable[[Tensor], Tensor],
    data: Sequence[Batch],
    accumulate: int = 1,
    scaler: torch.amp.GradScaler | None = None,
) -> list[Tensor]:
    """An ordinary loop, with the line; the losses of its own forwards."""
    graph = optimizer.method.backwards_create_graph
    losses: list[Tensor] = []

    def backward(window: Sequence[Batch]) -> list[Tensor]:
        found: list[Tensor] = []
        for batch in window:
            loss = loss_of(model, batch) / accumulate
            scaled: Any = loss if scaler is None else scaler.scale(loss)
            scaled.backward(create_graph=graph)
            found.append(loss.detach())
        return found

    for first in range(0, len(data), accumulate):
        window = data[first : first + accumulate]
        optimizer.zero_grad()
        losses += backward(window)
        optimizer.other_passes(functools.partial(backward, window))
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group['params']], CLIP)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return losses


def looped(method: SharpnessAware, **options: Any) -> tuple[nn.Module, LoopOptimizer]:
    model = network()
    return model, LoopOptimizer(BASES['SGD'](model.parameters()), method, model, **options)


@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('name', METHODS)
def test_one_line_after_the_backward_is_a_loop_over_passes(name: str, accumulate: int) -> None:
    method = made(name, **({} if name in ('LookSAM', 'AESAM') else {'interval': 2}))
    data = batches(6 * accumulate)
    model, optimizer, losses = by_passes(method, data, accumulate)
    end = torch.get_rng_state()
    torch.manual_seed(3)
    own, loop = looped(method)
    found = steps(loop, own, data, accumulate)
    assert same(own.state_dict(), model.state_dict())
    assert same(loop.state_dict(), optimizer.state_dict())
    assert same(found, losses)
    assert torch.equal(torch.get_rng_state(), end)


def test_a_scaler_stays_where_it_is() -> None:
    data = batches(6)
    model, _, _ = by_passes(SAM(rho=0.1, interval=2), data, 1)
    torch.manual_seed(3)
    scaler = torch.amp.GradScaler('cpu', init_scale=512.0, growth_interval=3)
    own, loop = looped(SAM(rho=0.1, interval=2), grad_scaler=scaler)
    steps(loop, own, data, scaler=scaler)
    assert same(own.state_dict(), model.state_dict())
    assert scaler.get_scale() == 2048.0


def test_an_overflow_in_the_second_pass_skips_the_step() -> None:
    scaler = torch.amp.GradScaler('cpu', init_scale=512.0)
    model, optimizer = looped(SAM(rho=0.1), grad_scaler=scaler)
    seen: list[int] = []

    def overflow(gradient: Tensor) -> Tensor:
        seen.append(1)
        return gradient * torch.inf if len(seen) == 2 else gradient

    next(model.parameters()).register_hook(overflow)
    before = copy.deepcopy(dict(model.named_parameters()))
    steps(optimizer, model, batches(1), scaler=scaler)
    assert same(dict(model.named_parameters()), before)
    assert scaler.get_scale() == 256.0
    steps(optimizer, model, batches(1), scaler=scaler)
    assert optimizer.steps_taken == 1


def test_the_compiled_model_is_the_one_to_give() -> None:
    data = batches(3)
    model, _, _ = by_passes(MSAM(rho=0.1), data, 1)
    torch.manual_seed(3)
    own = network()
    compiled = torch.compile(own, backend='eager')
    optimizer = LoopOptimizer(BASES['SGD'](own.parameters()), MSAM(rho=0.1), compiled)  # pyright: ignore
    steps(optimizer, compiled, data)  # pyright: ignore[reportArgumentType]
    assert same(own.state_dict(), model.state_dict())


def test_forwards_that_do_not_train_begin_nothing() -> None:
    model, optimizer = looped(SAM(rho=0.1))
    x, _ = batches(1)[0]
    with torch.no_grad():
        model(x)
    model.eval()(x)
    assert not optimizer.under_way
    model.train()(x)
    assert optimizer.under_way


@pytest.mark.parametrize('method', [SAM(rho=0.1), MSAM(), GAM()])
def test_an_error_in_the_line_undoes_the_step(method: SharpnessAware) -> None:
    model, optimizer = looped(method)
    steps(optimizer, model, batches(1))
    before = snapshot(model, optimizer)
    loss_of(model, batches(1)[0]).backward()

    def fails() -> None:
        raise MemoryError

    if method.passes == 1:
        optimizer.abandon_step()
    else:
        with pytest.raises(MemoryError):
            optimizer.other_passes(fails)
    assert same(snapshot(model, optimizer), before)
    steps(optimizer, model, batches(1))
    assert optimizer.steps_taken == 2


@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated')
def test_what_is_missing_is_said() -> None:
    model, optimizer = looped(SAM(rho=0.1))
    with pytest.raises(ValueError, match='needs a forward of the model in training mode'):
        optimizer.other_passes(lambda: None)
    with pytest.raises(ValueError, match='without a forward'):
        loss_of(network(), batches(1)[0]).backward()
        optimizer.step()
    before = snapshot(model, optimizer)
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(ValueError, match=r'step\(\) came before other_passes'):
        optimizer.step()
    assert same(snapshot(model, optimizer), before)
    with pytest.raises(ValueError, match='takes no closure'):
        optimizer.step(lambda: None)
    model(batches(1)[0][0])
    with pytest.raises(ValueError, match=r'must call backward\(\)'):
        optimizer.other_passes(lambda: None)
    with pytest.raises(ValueError, match=r'ascent_fraction=0.5 needs passes\(\)'):
        looped(SAM(ascent_fraction=0.5))
    with pytest.raises(ValueError, match='TorchScript takes no hooks'):
        scripted = torch.jit.script(network())
        LoopOptimizer(BASES['SGD'](scripted.parameters()), SAM(), scripted)


def test_the_hook_does_not_keep_the_optimizer_and_a_copy_of_the_model_has_none() -> None:
    model, optimizer = looped(SAM(rho=0.1))
    twin = copy.deepcopy(model)
    twin(batches(1)[0][0])
    assert not optimizer.under_way
    del optimizer
    gc.collect()
    model(batches(1)[0][0])

"""What a new user gets wrong is said, in one sentence with the remedy, before anything is stepped."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from composer_sam import GAM, SAM, WSAM, SharpnessAwareOptimizer, registry
from composer_sam.diagnostics import top_eigenvalues
from tests.problems import BASES, Closure, batches, made, network, same, snapshot

# The model.


def test_a_model_without_the_optimizers_parameters_is_an_error() -> None:
    other = network()
    hooks = len(other._forward_pre_hooks)
    with pytest.raises(ValueError, match="Sequential that holds none of the optimizer's 7 parameters"):
        SharpnessAwareOptimizer(BASES['SGD'](network().parameters()), SAM(), other)
    assert len(other._forward_pre_hooks) == hooks


def test_a_model_with_a_part_of_the_parameters_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    with caplog.at_level(logging.WARNING):
        SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SAM(), model[0])
    assert "The model holds 1 of the optimizer's 7 parameters" in caplog.text


@pytest.mark.parametrize(('given', 'expected'), [(True, 0), (False, 1)])
def test_a_step_without_the_model_is_said_once(given: bool, expected: int, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SAM(interval=2), model if given else None)
    with caplog.at_level(logging.WARNING):
        for batch in batches(6):
            optimizer.step(Closure(model, batch))
    line = 'SharpnessAwareOptimizer(base_optimizer, method, model)'
    assert sum(line in record.message for record in caplog.records) == expected


# A scaler around the loss that the optimizer does not know.


def _scaled(model: nn.Module, scaler: torch.amp.GradScaler, batch: Any) -> torch.Tensor:
    x, y = batch
    loss = nn.functional.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    return loss


def _by_closure(optimizer: Any, scaler: Any, model: nn.Module, batch: Any) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return _scaled(model, scaler, batch)

    optimizer.step(closure)


def _by_passes(optimizer: Any, scaler: Any, model: nn.Module, batch: Any) -> None:
    for _ in optimizer.passes():
        optimizer.zero_grad()
        _scaled(model, scaler, batch)


def _by_scaler_step(optimizer: Any, scaler: Any, model: nn.Module, batch: Any) -> None:
    _scaled(model, scaler, batch)
    scaler.step(optimizer, lambda: _scaled(model, scaler, batch))


def _by_unscale(optimizer: Any, scaler: Any, model: nn.Module, batch: Any) -> None:
    _scaled(model, scaler, batch)
    scaler.unscale_(optimizer)


@pytest.mark.parametrize('interval', [1, 3])
@pytest.mark.parametrize('way', [_by_closure, _by_passes, _by_scaler_step, _by_unscale])
def test_a_scaler_that_was_not_given_is_refused_before_stepping(way: Callable[..., None], interval: int) -> None:
    model = network()
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SAM(interval=interval), model)
    scaler = torch.amp.GradScaler('cpu')
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scale = torch.amp.GradScaler.scale
    with pytest.raises(ValueError, match=r'grad_scaler=scaler\)'):
        way(optimizer, scaler, model, batches(1)[0])
    assert same(before, [parameter.detach() for parameter in model.parameters()])
    assert optimizer.steps_taken == 0
    assert torch.amp.GradScaler.scale is scale


def test_a_scaler_that_was_given_must_not_unscale_by_itself() -> None:
    model = network()
    scaler = torch.amp.GradScaler('cpu')
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SAM(), model, scaler)
    with pytest.raises(ValueError, match='cannot unscale an optimizer whose step has several passes'):
        _by_unscale(optimizer, scaler, model, batches(1)[0])


def test_a_disabled_scaler_is_no_reason() -> None:
    model = network()
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SAM(), model)
    _by_closure(optimizer, torch.amp.GradScaler('cpu', enabled=False), model, batches(1)[0])
    assert optimizer.steps_taken == 1


# The call of the classic implementation.


def wrong(method: object) -> Any:
    """The method's class, to be called in a way that type checkers refuse."""
    return method


@pytest.mark.parametrize(
    ('call', 'written'),
    [
        (
            lambda p: wrong(SAM)(p, torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9),
            'SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), SAM(rho=0.05), model)',
        ),
        (
            lambda p: wrong(WSAM)(list(p), base_optimizer=torch.optim.AdamW, gamma=0.8, lr=0.01),
            'SharpnessAwareOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), WSAM(gamma=0.8), model)',
        ),
        (
            lambda p: wrong(GAM)(torch.optim.SGD(p, lr=0.1), adaptive=True),
            'SharpnessAwareOptimizer(optimizer, GAM(adaptive=True), model)',
        ),
        (
            lambda p: wrong(SAM)([{'params': list(p)}], lr=0.1),
            'SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SAM(), model)',
        ),
    ],
)
def test_the_classic_call_says_what_to_write(call: Callable[[Any], Any], written: str) -> None:
    with pytest.raises(TypeError) as found:
        call(network().parameters())
    assert str(found.value).endswith(f'Write: {written}')


def test_other_wrong_arguments_are_what_python_says() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'roh'"):
        wrong(SAM)(roh=0.1)


# What a method is to a reader.


@pytest.mark.parametrize('name', sorted(registry))
def test_a_method_shows_what_differs_from_its_defaults(name: str) -> None:
    assert repr(registry[name]()) == f'{name}()'
    assert repr(registry[name](interval=3)) == f'{name}(interval=3)'
    assert repr(copy.deepcopy(registry[name](start='5ba'))) == f"{name}(start='5ba')"


@pytest.mark.parametrize('name', sorted(registry))
def test_the_signature_of_a_method_is_its_hyperparameters(name: str) -> None:
    parameters = inspect.signature(registry[name]).parameters
    assert {'interval', 'start', 'end', 'schedules'} < parameters.keys()
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())


def test_the_host_is_no_positional_argument() -> None:
    parameters = inspect.signature(SharpnessAwareOptimizer.__init__).parameters
    assert 'trainer' not in parameters
    assert parameters['host'].kind is inspect.Parameter.KEYWORD_ONLY


# Diagnostics.


@pytest.mark.parametrize('given', [(torch.randn(8, 6), torch.randint(4, (8,))), [torch.randn(8, 6)], [(1, 2, 3)]])
def test_batches_that_are_no_pairs_are_named(given: Any) -> None:
    with pytest.raises(ValueError, match=r'batches must be an iterable of \(inputs, targets\), got a .*: write \['):
        top_eigenvalues(network(), nn.functional.cross_entropy, given)


# A loss that does not leave its initial value.


def _hints(rho: float, interval: int, caplog: pytest.LogCaptureFixture) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = SharpnessAwareOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), SAM(rho=rho, interval=interval), model
    )
    x, y = torch.randn(64, 20), torch.randint(10, (64,))
    with caplog.at_level(logging.WARNING):
        for _ in range(150 * interval):
            optimizer.step(Closure(model, (x, y)))
    return sum('still at its initial value' in record.message for record in caplog.records)


def test_a_radius_that_stops_training_is_hinted_at_once(caplog: pytest.LogCaptureFixture) -> None:
    assert _hints(2.0, 1, caplog) == 1


@pytest.mark.parametrize('interval', [1, 2])
def test_training_that_moves_gets_no_hint(interval: int, caplog: pytest.LogCaptureFixture) -> None:
    assert _hints(0.05, interval, caplog) == 0


def test_a_step_without_a_trainer_leaves_nothing_behind_of_its_losses() -> None:
    model = network()
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SAM(), model)
    optimizer.step(Closure(model, batches(1)[0]))
    assert all(not loss.requires_grad for loss in optimizer._losses)
    assert snapshot(model, optimizer)['steps'] == 1


@pytest.mark.parametrize('name', [name for name in registry if made(name).remembers])
def test_a_resumed_run_that_has_lost_what_the_method_remembers_says_so_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    said = f'{name} begins anew at step 7: what it remembers was not in the checkpoint that was loaded.'
    for resumed, expected in ((False, 0), (True, 1)):
        caplog.clear()
        model = network()
        optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), made(name, interval=2), model)
        optimizer.steps_taken = 7 if resumed else 0
        with caplog.at_level(logging.WARNING, 'composer_sam'):
            for batch in batches(6):
                optimizer.step(Closure(model, batch))
        assert sum(record.getMessage().startswith(said) for record in caplog.records) == expected

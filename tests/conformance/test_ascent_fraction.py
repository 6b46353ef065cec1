"""The first pass on a part of the batch: the perturbation is that part's, everything else the whole batch's."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composer_sam import SAM, SharpnessAwareOptimizer, registry
from composer_sam.engine.pass_number import PassNumber
from tests.problems import Recorder, batches, network, same, snapshot

CAN = [name for name, method in registry.items() if method.first_pass_only_perturbs]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def take(optimizer: SharpnessAwareOptimizer, model: nn.Module, batch: Any, way: str, seen: list[int]) -> Any:
    if way == 'closure':

        def closure(number: PassNumber) -> Tensor:
            optimizer.zero_grad()
            part = number.part(batch)
            seen.append(len(part[0]))
            loss = loss_of(model, part)
            loss.backward()
            return loss

        return optimizer.step(closure)
    for number in optimizer.passes():
        optimizer.zero_grad()
        part = number.part(batch)
        seen.append(len(part[0]))
        loss_of(model, part).backward()
    return None


@pytest.mark.parametrize('way', ['closure', 'loop'])
@pytest.mark.parametrize(('fraction', 'samples'), [(0.25, 3), (0.3, 4), (0.01, 1), (1.0, 12)])
def test_the_direction_is_the_whole_batchs_at_the_weights_that_the_part_perturbs(
    way: str, fraction: float, samples: int
) -> None:
    model = network(torch.float64, dropout=0.0)
    model.eval()  # BatchNorm would otherwise normalise the part by itself
    batch = batches(1, torch.float64)[0]
    base = Recorder(model.parameters())
    seen: list[int] = []
    optimizer = SharpnessAwareOptimizer(base, SAM(rho=0.3, ascent_fraction=fraction), model)
    take(optimizer, model, batch, way, seen)
    assert seen == [samples, 12]
    weights = list(model.parameters())
    part = torch.autograd.grad(loss_of(model, (batch[0][:samples], batch[1][:samples])), weights)
    length = torch.cat([g.flatten() for g in part]).norm()
    with torch.no_grad():
        for weight, g in zip(weights, part, strict=True):
            weight += 0.3 * g / length
    expected = torch.autograd.grad(loss_of(model, batch), weights)
    for found, wanted in zip(base.directions[0], expected, strict=True):
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('way', ['closure', 'loop'])
@pytest.mark.parametrize('name', CAN)
def test_buffers_and_random_streams_are_those_of_one_pass_over_the_whole_batch(name: str, way: str) -> None:
    states = []
    for sharp in (False, True):
        model = network(dropout=0.5)
        base: Any = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        radius: dict[str, Any] = {'gamma' if name == 'FisherSAM' else 'rho': 1e-30}
        method = registry[name](ascent_fraction=0.25, **radius)
        torch.manual_seed(5)
        if sharp:
            take(SharpnessAwareOptimizer(base, method, model), model, batches(1)[0], way, [])
        else:
            loss_of(model, batches(1)[0]).backward()
            base.step()
        momenta = [base.state[parameter]['momentum_buffer'] for parameter in model.parameters()]
        states.append((snapshot(model, base)['random'], snapshot(model, base)['model'], momenta))
    assert same(*states)


def test_the_loss_is_that_of_the_pass_over_the_whole_batch() -> None:
    model = network(dropout=0.0)
    optimizer = SharpnessAwareOptimizer(Recorder(model.parameters()), SAM(rho=1e-30, ascent_fraction=0.25), model)
    loss = take(optimizer, model, batches(1)[0], 'closure', [])
    assert torch.equal(loss, loss_of(model, batches(1)[0]))


@pytest.mark.parametrize('index', [1, 2])
def test_a_fault_leaves_everything_as_it_was(index: int) -> None:
    model = network(dropout=0.5)
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SAM(ascent_fraction=0.5), model)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match='in the pass'):
        for number in optimizer.passes():
            loss_of(model, number.part(batches(1)[0])).backward()
            if number == index - 1:
                raise RuntimeError('in the pass')
    assert same(before, snapshot(model, optimizer))


def test_parts_of_nested_batches() -> None:
    number = PassNumber(0, 0.5)
    batch = {'x': torch.arange(5), 'more': [torch.ones(5, 2), (torch.tensor(3.0), 'name')]}
    part = number.part(batch)
    assert part['x'].tolist() == [0, 1, 2]
    assert part['more'][0].shape == (3, 2)
    assert part['more'][1] == (torch.tensor(3.0), 'name')
    assert PassNumber(1).part(batch) is batch
    assert [number, PassNumber(1)] == [0, 1]


@pytest.mark.parametrize('fraction', [0, -0.5, 1.5, float('nan'), 'half'])
def test_a_fraction_out_of_range_is_refused(fraction: Any) -> None:
    with pytest.raises(ValueError, match='ascent_fraction must be a finite number > 0 and <= 1'):
        SAM(ascent_fraction=fraction)


@pytest.mark.parametrize('name', sorted(registry.keys() - set(CAN)))
def test_methods_whose_first_gradient_is_in_the_direction_refuse_it(name: str) -> None:
    with pytest.raises(ValueError, match='its first gradient is a part of the direction'):
        registry[name](ascent_fraction=0.5)


def test_what_cannot_know_the_part_is_refused() -> None:
    model = network()
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SAM(ascent_fraction=0.5), model)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match='needs a closure that takes the pass'):
        optimizer.step(lambda: loss_of(model, batches(1)[0]))
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(ValueError, match='the two calls do not know which samples'):
        optimizer.first_step()
    assert same(before['optimizer'], snapshot(model, optimizer)['optimizer'])


def test_a_batch_without_samples_to_cut_is_refused() -> None:
    """Where nothing is cut, the pass would see the whole batch."""
    number = PassNumber(0, 0.5)
    assert number.part({'x': torch.zeros(4), 'scale': torch.tensor(1.0), 'name': 'a'})['x'].shape == (2,)
    for batch in (UserDict(x=torch.zeros(4)), torch.tensor(1.0), 'text', []):
        with pytest.raises(ValueError, match=f'cannot cut a batch of type {type(batch).__name__}'):
            number.part(batch)
    assert PassNumber(1).part('text') == 'text'

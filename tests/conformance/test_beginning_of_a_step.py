"""Two calls: what the first forward draws and counts is known however the model is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composer_sam import SAM, SharpnessAwareOptimizer
from tests.problems import BASES, batches, network, same

STEPS = 4


class Task(nn.Module):
    """A network whose loss is found by a method of its own, as in many trainers."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network(dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    def deeper(self, batch: Any) -> Tensor:
        x, y = batch
        for part in self.network:
            x = part(x)
        return nn.functional.cross_entropy(x, y)


def called(model: Task, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


WAYS: list[Callable[[Task, Any], Tensor]] = [called, Task.loss, Task.deeper]


def begun() -> tuple[Task, SharpnessAwareOptimizer]:
    torch.manual_seed(0)
    model = Task()
    return model, SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SAM(rho=0.1), model)


def two_calls(way: Callable[[Task, Any], Tensor], model: Task, optimizer: SharpnessAwareOptimizer, batch: Any) -> None:
    way(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    way(model, batch).backward()
    optimizer.second_step(zero_grad=True)


@pytest.mark.parametrize('way', WAYS)
def test_two_calls_equal_the_loop_from_the_first_step_on(way: Callable[[Task, Any], Tensor]) -> None:
    found = []
    for driven in ('loop', 'two calls'):
        model, optimizer = begun()
        torch.manual_seed(1)
        for batch in batches(STEPS):
            torch.rand(3)  # what loads the data draws, too
            if driven == 'two calls':
                two_calls(way, model, optimizer, batch)
                continue
            for _ in optimizer.passes():
                optimizer.zero_grad()
                way(model, batch).backward()
        found.append((list(model.parameters()), list(model.buffers()), torch.get_rng_state()))
    assert same(found[0], found[1])


def test_a_model_that_is_no_longer_called_itself_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """The first such step has another mask in its second forward, which is said; the parts are watched from then on."""
    found = []
    for way in (called, Task.deeper):
        model, optimizer = begun()
        torch.manual_seed(1)
        first, *others = batches(3)
        two_calls(called, model, optimizer, first)
        two_calls(way, model, optimizer, others[0])
        if way is Task.deeper:
            model.load_state_dict(found[0][0])
            optimizer.load_state_dict(found[0][1])
            torch.set_rng_state(found[0][2])
        else:
            found.append(
                (copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), torch.get_rng_state())
            )
        two_calls(way, model, optimizer, others[1])
        found.append((list(model.parameters()), list(model.buffers())))
    assert same(found[1], found[2])
    assert sum('whose beginning was not seen' in record.getMessage() for record in caplog.records) == 1


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_the_parts_are_watched_only_as_long_as_they_must_be() -> None:
    parts = len(list(Task().modules()))
    model, optimizer = begun()
    (batch,) = batches(1)
    assert hooks(model) == parts
    two_calls(Task.loss, model, optimizer, batch)
    assert hooks(model) == parts
    two_calls(called, model, optimizer, batch)
    assert hooks(model) == 1
    model, optimizer = begun()
    for _ in optimizer.passes():
        optimizer.zero_grad()
        model.loss(batch).backward()
    assert hooks(model) == 1
    assert hooks(copy.deepcopy(begun()[0])) == parts  # which do nothing


def test_a_forward_without_gradients_is_no_beginning() -> None:
    found = []
    (batch,) = batches(1)
    for looks in (False, True):
        model, optimizer = begun()
        torch.manual_seed(1)
        if looks:
            buffers = copy.deepcopy(model.state_dict())
            with torch.no_grad():
                model.loss(batch)
            model.load_state_dict(buffers)
            torch.manual_seed(1)
        two_calls(Task.loss, model, optimizer, batch)
        found.append(list(model.parameters()))
    assert same(found[0], found[1])

"""Copies, pickles, subclasses and checkpoints of a wrapped optimizer go on as the original."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from composer_sam import SAM, SharpnessAwareOptimizer
from tests.conformance.parts import METHODS
from tests.problems import (
    BASES,
    Closure,
    batches,
    made,
    needs_graph,
    network,
    same,
    snapshot,
)


@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize('name', METHODS)
def test_copies_continue_as_the_original(name: str, base: str) -> None:
    model = network(dropout=0.0)
    optimizer = SharpnessAwareOptimizer(BASES[base](model.parameters()), made(name, interval=2), model)
    data = batches(6)
    for batch in data[:3]:
        optimizer.step(Closure(model, batch, graph=needs_graph(name)))
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer))), (model, optimizer)]
    for one_model, one in pairs:
        assert isinstance(one, SharpnessAwareOptimizer)
        assert type(one).__qualname__ == base
        for batch in data[3:]:
            one.step(Closure(one_model, batch, graph=needs_graph(name)))
    assert same(list(model.parameters()), list(pairs[0][0].parameters()))
    assert same(list(model.parameters()), list(pairs[1][0].parameters()))
    assert same(pairs[0][1].state_dict(), optimizer.state_dict())


class Counting(SharpnessAwareOptimizer):
    """A user's own wrapper."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return super().step(closure)


def test_a_subclass_is_what_it_says_and_so_are_its_copies() -> None:
    model = network(dropout=0.0)
    optimizer = Counting(BASES['SGD'](model.parameters()), SAM(), model)
    plain = copy.deepcopy(model)
    reference = SharpnessAwareOptimizer(BASES['SGD'](plain.parameters()), SAM(), plain)
    for batch in batches(2):
        optimizer.step(Closure(model, batch))
        reference.step(Closure(plain, batch))
    assert same(list(model.parameters()), list(plain.parameters()))
    assert optimizer.calls == 2
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert isinstance(one, Counting)
        assert type(one).__qualname__ == 'SGD'


@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize('name', METHODS)
def test_resume_from_the_base_optimizers_checkpoint(name: str, base: str) -> None:
    data = batches(6)
    method = made(name, interval=2)
    model = network(dropout=0.0)
    optimizer = SharpnessAwareOptimizer(BASES[base](model.parameters()), method, model)
    for batch in data[:3]:
        optimizer.step(Closure(model, batch, graph=needs_graph(name)))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for batch in data[3:]:
        optimizer.step(Closure(model, batch, graph=needs_graph(name)))

    resumed = network(dropout=0.0, seed=9)
    resumed.load_state_dict(saved[0])
    plain = BASES[base](resumed.parameters())
    plain.load_state_dict(saved[1])  # the plain optimizer reads it,
    again = SharpnessAwareOptimizer(plain, method, resumed)
    again.load_state_dict(saved[1])  # and so does the wrapper
    again.steps_taken = 3
    for batch in data[3:]:
        again.step(Closure(resumed, batch, graph=needs_graph(name)))
    assert same(snapshot(model, optimizer)['model'], snapshot(resumed, again)['model'])
    assert same(optimizer.state_dict(), again.state_dict())

"""The engine under DistributedDataParallel, with an ordinary closure."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problem import (
    METHODS,
    STEPS,
    SYNCHRONISED,
    Network,
    assert_ranks_equal,
    batches,
    bits,
    closure_for,
    counted_reductions,
    flat,
    sam_by_hand,
    train,
    union,
)
from ranks import two_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from composer_sam import SAM, SharpnessAwareOptimizer
from tests.problems import made, mostly_slow, needs_graph, with_all_passes

RHO = 0.3
every_method = pytest.mark.parametrize('name', METHODS)
every_synchronised_method = pytest.mark.parametrize('name', SYNCHRONISED)


@two_ranks
def test_first_pass_is_unsynchronised() -> None:
    """Each rank perturbs by its own gradient: the published m-sharpness, here written out in one process."""
    model = DistributedDataParallel(Network())
    train(model, SAM(rho=RHO), batches(dist.get_rank()))
    expected = Network()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    data = list(zip(*[batches(rank) for rank in range(dist.get_world_size())], strict=True))
    sam_by_hand(expected, data, RHO, optimizer)
    assert_close(flat(model), flat(expected), rtol=1e-10, atol=1e-13)
    one = Network()
    train(one, SAM(rho=RHO), union())
    assert (flat(model) - flat(one)).abs().max() > 1e-4, 'the test cannot tell local from global perturbations'


@two_ranks
@every_synchronised_method
def test_synchronised_first_pass_equals_one_process_on_the_union(name: str) -> None:
    model, expected = DistributedDataParallel(Network()), Network()
    train(model, made(name, sync_first_pass=True), batches(dist.get_rank()))
    train(expected, made(name), union())
    assert_close(flat(model), flat(expected), rtol=1e-9, atol=1e-12)


@two_ranks
@every_method
def test_equal_data_on_all_ranks_equals_one_process(name: str) -> None:
    """With the same samples everywhere a rank's gradient is the mean, so no synchronisation may matter."""
    model, expected = DistributedDataParallel(Network()), Network()
    train(model, made(name), batches(0))
    train(expected, made(name), batches(0))
    assert_close(flat(model), flat(expected), rtol=1e-9, atol=1e-12)


@two_ranks
@every_method
def test_ranks_stay_bit_identical(name: str) -> None:
    """Different data, so different offsets; nothing of them may stay in the weights. fp32 and bf16, all groups."""
    # DistributedDataParallel synchronises no gradient that has a graph, which such a method's closure makes
    interval = 1 if needs_graph(name) else 2
    for dtype in (torch.float32, torch.bfloat16):
        model = DistributedDataParallel(Network(dtype))
        train(model, made(name, interval=interval), batches(dist.get_rank(), 2 * STEPS, dtype))
        assert_ranks_equal(model)


@two_ranks
@every_synchronised_method
def test_gradient_as_bucket_view_changes_no_bit(name: str) -> None:
    """The reducer's buckets are filled again by the next pass: a gradient kept as a view of them would change."""
    results = []
    for view in (False, True):
        model = DistributedDataParallel(Network(), gradient_as_bucket_view=view)
        for sync in (False, True):
            train(model, made(name, sync_first_pass=sync), batches(dist.get_rank()))
        results.append(flat(model))
    assert torch.equal(*results)


@two_ranks
@pytest.mark.parametrize('sync', [False, True])
def test_gradient_synchronisations_per_step(sync: bool) -> None:
    """One for SAM, not two: the first pass waits for nobody. Nor are there collectives of the engine's own."""
    model = DistributedDataParallel(Network())
    with counted_reductions(model) as reductions:
        train(model, SAM(interval=2, sync_first_pass=sync), batches(dist.get_rank(), 10))
    assert reductions == ['gradients'] * (10 + 5 * sync), reductions


@two_ranks
@pytest.mark.parametrize('where', ['forward', 'backward'])
@pytest.mark.parametrize('name', mostly_slow(METHODS))
def test_error_on_both_ranks_restores_and_training_continues(name: str, where: str) -> None:
    method = with_all_passes(name)
    for failing in range(1, method.passes + 1):
        model, expected = DistributedDataParallel(Network()), DistributedDataParallel(Network())
        data = batches(dist.get_rank(), 6)
        settings: dict[str, Any] = {'lr': 0.1, 'momentum': 0.9}
        optimizer = train(model, method, data[:3], **settings)
        weights, state = bits(model), copy.deepcopy(optimizer.state_dict()['state'])
        streams = random.getstate(), torch.get_rng_state()
        model.module.fault.arm(where, failing)
        with pytest.raises(RuntimeError, match='injected'):
            optimizer.step(closure_for(optimizer, model, data[3]))
        assert all(torch.equal(*pair) for pair in zip(weights, bits(model), strict=True)), f'pass {failing}'
        assert_close(optimizer.state_dict()['state'], state, rtol=0, atol=0)
        assert all(p.grad is None for p in model.parameters())
        assert random.getstate() == streams[0]
        assert torch.equal(torch.get_rng_state(), streams[1])
        for batch in data[3:]:
            optimizer.step(closure_for(optimizer, model, batch))
        train(expected, method, data, **settings)
        assert torch.equal(flat(model), flat(expected)), f'after a failure in pass {failing}'


class _Branches(Network):
    """One layer gets no gradient at all, and one is frozen."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__(dtype)
        self.unused = nn.Linear(2, 3, dtype=dtype)
        nn.init.constant_(self.unused.weight, 0.5)
        nn.init.constant_(self.unused.bias, 0.5)
        self.second.requires_grad_(False)


@two_ranks
@every_synchronised_method
def test_unused_and_frozen_parameters(name: str) -> None:
    model = DistributedDataParallel(_Branches(), find_unused_parameters=True)
    expected = _Branches()
    train(model, made(name, sync_first_pass=True), batches(dist.get_rank()))
    train(expected, made(name), union())
    assert_close(flat(model), flat(expected), rtol=1e-9, atol=1e-12)
    assert torch.equal(model.module.second.weight, Network().second.weight)


@two_ranks
@every_synchronised_method
def test_static_graph(name: str) -> None:
    """With a static graph DistributedDataParallel cannot leave its very first pass unsynchronised, only the others."""
    data = batches(dist.get_rank())
    settings: dict[str, Any] = {'lr': 0.1}
    model = DistributedDataParallel(Network(), static_graph=True)
    train(model, made(name), data, **settings)
    assert_ranks_equal(model)
    if name == 'SAM':
        expected = DistributedDataParallel(Network())
        train(expected, SAM(sync_first_pass=True), data[:1], **settings)
        train(expected, SAM(), data[1:], **settings)
        assert_close(flat(model), flat(expected), rtol=1e-10, atol=1e-13)


class _Stateful(Network):
    """A forward that reads a buffer, and moves it by what it saw of this rank's data."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__(dtype)
        self.centre = nn.Buffer(torch.zeros(6, dtype=dtype))
        self.notes = SimpleNamespace(read=[])  # a list would be put back between passes

    def forward(self, x: Tensor) -> Tensor:
        self.notes.read.append(self.centre.clone())
        with torch.no_grad():
            self.centre.mul_(0.5).add_(x.mean(0), alpha=0.5)
        return super().forward(x - self.centre)


@two_ranks
@every_synchronised_method
@pytest.mark.parametrize('sync', [False, True])
def test_every_pass_reads_the_buffers_the_first_pass_read(name: str, sync: bool) -> None:
    """DistributedDataParallel hands out rank 0's buffers at the first pass's forward; the others must see the same."""
    method = with_all_passes(name, sync_first_pass=sync)
    model = DistributedDataParallel(_Stateful())
    wrapper = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, model)
    plain = DistributedDataParallel(_Stateful())
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    for batch in batches(dist.get_rank(), 4):
        model.module.notes.read.clear()
        wrapper.step(closure_for(wrapper, model, batch))
        base.zero_grad()
        nn.functional.mse_loss(plain(batch[0]), batch[1]).backward()
        base.step()
        first, *further = model.module.notes.read
        assert len(further) == method.passes - 1
        assert all(torch.equal(first, other) for other in further)
        assert torch.equal(first, plain.module.notes.read[-1])
        assert torch.equal(model.module.centre, plain.module.centre)

"""Hugging Face Accelerate on two ranks: DistributedDataParallel, with and without accumulation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist

pytest.importorskip('accelerate', reason="accelerate is not installed: pip install 'composer-sam[accelerate]'")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from problem import METHODS, Network, batches, counted_reductions, flat
from ranks import gathered, two_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from composer_sam import SharpnessAwareOptimizer
from composer_sam.methods.base import SharpnessAware
from composer_sam.trainers.accelerate import SharpnessAwareSteps
from tests.problems import made, needs_graph

Batch = tuple[Tensor, Tensor]


def with_accelerate(method: SharpnessAware, data: Sequence[Batch], accumulate: int) -> tuple[nn.Module, list[str]]:
    """A loop as a user writes it; the model, and the reductions over ranks."""
    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = Network()
        model, optimizer = accelerator.prepare(model, _base(model))
        assert isinstance(model, DistributedDataParallel)
        steps = SharpnessAwareSteps(accelerator, method, model, optimizer)
        with counted_reductions(model) as reductions:
            for step in steps(data):
                for x, y in step:
                    accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        return model, reductions
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def by_passes(method: SharpnessAware, data: Sequence[Batch], accumulate: int) -> nn.Module:
    """The same in a plain loop, with DistributedDataParallel's own no_sync."""
    model = DistributedDataParallel(Network())
    optimizer = SharpnessAwareOptimizer(_base(model), method, model)
    for first in range(0, len(data), accumulate):
        window = data[first : first + accumulate]
        for _ in optimizer.passes():
            optimizer.zero_grad()
            with model.no_sync():
                for batch in window[:-1]:
                    _backward(model, batch, accumulate)
            _backward(model, window[-1], accumulate)
    return model


def _base(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


def _backward(model: nn.Module, batch: Batch, accumulate: int) -> None:
    (nn.functional.cross_entropy(model(batch[0]), batch[1]) / accumulate).backward()


def _windows() -> Iterator[tuple[bool, int]]:
    for sync in (False, True):
        for accumulate in (1, 2):
            yield sync, accumulate


@two_ranks
@pytest.mark.parametrize('name', [name for name in METHODS if not needs_graph(name)])
def test_its_steps_are_those_of_a_plain_loop_and_ranks_stay_equal(name: str) -> None:
    data = batches(dist.get_rank(), 6)
    for sync, accumulate in _windows():
        if sync and name in ('MSAM', 'DPSAT'):  # their first pass finds no perturbation
            continue
        method = made(name, **({'sync_first_pass': True} if sync else {}))
        found = flat(with_accelerate(method, data, accumulate)[0])
        assert torch.equal(found, flat(by_passes(method, data, accumulate)))
        first, *others = gathered(found)
        assert all(torch.equal(first, other) for other in others), 'the ranks hold different weights'


@two_ranks
def test_the_first_pass_is_synchronised_only_if_that_is_asked_for() -> None:
    data = batches(dist.get_rank(), 4)
    for sync, averaged in ((False, 1), (True, 2)):
        _, reductions = with_accelerate(made('SAM', sync_first_pass=sync), data, 2)
        assert reductions.count('gradients') == 2 * averaged

"""A loop that stays as it is, on two ranks: DistributedDataParallel, with and without accumulation."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from problem import METHODS, Network, assert_ranks_equal, base_of, batches, by_passes, counted_reductions, flat, loss_of
from ranks import two_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from composer_sam import LoopOptimizer
from composer_sam.methods.base import SharpnessAware
from tests.problems import made, needs_graph

Batch = tuple[Tensor, Tensor]


def _backward(model: DistributedDataParallel, window: Sequence[Batch]) -> None:
    """Forward and backward of all micro-batches, which averages gradients over ranks after the last one."""
    for number, batch in enumerate(window, start=1):
        with contextlib.nullcontext() if number == len(window) else model.no_sync():
            (loss_of(model, batch) / len(window)).backward()


def looped(method: SharpnessAware, data: Sequence[Batch], accumulate: int) -> tuple[nn.Module, list[str]]:
    """The loop, and the reductions over ranks."""
    model = DistributedDataParallel(Network())
    optimizer = LoopOptimizer(base_of(model), method, model)
    with counted_reductions(model) as reductions:
        for first in range(0, len(data), accumulate):
            window = data[first : first + accumulate]
            optimizer.zero_grad()
            _backward(model, window)
            optimizer.other_passes(lambda window=window: _backward(model, window))
            optimizer.step()
    assert model.require_backward_grad_sync
    return model, reductions


@two_ranks
@pytest.mark.parametrize('name', [name for name in METHODS if not needs_graph(name)])
def test_its_steps_are_those_of_a_loop_over_passes_and_ranks_stay_equal(name: str) -> None:
    data = batches(dist.get_rank(), 6)
    for accumulate in (1, 3):
        found, _ = looped(made(name), data, accumulate)
        model = DistributedDataParallel(Network())
        by_passes(made(name), data, model, accumulate)
        assert torch.equal(flat(found), flat(model))
        assert_ranks_equal(found)


@two_ranks
@pytest.mark.parametrize('accumulate', [1, 2])
def test_the_first_pass_is_synchronised_only_if_that_is_asked_for(accumulate: int) -> None:
    data = batches(dist.get_rank(), 4)
    for sync, averaged in ((False, 1), (True, 2)):
        _, reductions = looped(made('SAM', sync_first_pass=sync), data, accumulate)
        assert reductions.count('gradients') == len(data) // accumulate * averaged

"""Hugging Face Accelerate on two ranks: DistributedDataParallel, with and without accumulation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist

pytest.importorskip('accelerate', reason="accelerate is not installed: pip install 'composer-sam[accelerate]'")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from problem import METHODS, Network, assert_ranks_equal, base_of, batches, by_passes, counted_reductions, flat, loss_of
from ranks import two_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from composer_sam.methods.base import SharpnessAware
from composer_sam.trainers.accelerate import SharpnessAwareSteps
from tests.problems import made, needs_graph

Batch = tuple[Tensor, Tensor]


def with_accelerate(method: SharpnessAware, data: Sequence[Batch], accumulate: int) -> tuple[nn.Module, list[str]]:
    """A loop as a user writes it; the model, and the reductions over ranks."""
    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = Network()
        model, optimizer = accelerator.prepare(model, base_of(model))
        assert isinstance(model, DistributedDataParallel)
        steps = SharpnessAwareSteps(accelerator, method, model, optimizer)
        with counted_reductions(model) as reductions:
            for step in steps(data):
                for batch in step:
                    accelerator.backward(loss_of(model, batch))
                optimizer.step()
                optimizer.zero_grad()
        return model, reductions
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


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
        found, _ = with_accelerate(method, data, accumulate)
        model = DistributedDataParallel(Network())
        by_passes(method, data, model, accumulate)
        assert torch.equal(flat(found), flat(model))
        assert_ranks_equal(found)


@two_ranks
def test_the_first_pass_is_synchronised_only_if_that_is_asked_for() -> None:
    data = batches(dist.get_rank(), 4)
    for sync, averaged in ((False, 1), (True, 2)):
        _, reductions = with_accelerate(made('SAM', sync_first_pass=sync), data, 2)
        assert reductions.count('gradients') == 2 * averaged

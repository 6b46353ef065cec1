"""The geometry of directions on two ranks is that of one process on the union of their batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from problem import Network, batches, closure_for, union
from ranks import two_ranks
from test_fsdp import SHARDED
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from composer_sam import SAM, SharpnessAwareOptimizer
from composer_sam.diagnostics import gradient_geometry


def _watched(model: nn.Module, data: Any, method: SAM) -> list[list[float]]:
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, model)
    seen: list[list[float]] = []
    optimizer.observer = lambda g, d: seen.append(list(gradient_geometry(g, d).as_dict().values()))
    for batch in data:
        optimizer.step(closure_for(optimizer, model, batch))
    return seen


@two_ranks
@pytest.mark.parametrize('wrapper', ['ddp', 'fsdp1-FULL_SHARD-original', 'fsdp2-reshard'])
def test_two_ranks_see_what_one_process_sees(wrapper: str) -> None:
    network = Network()
    model = DistributedDataParallel(network) if wrapper == 'ddp' else SHARDED[wrapper](network)
    ours = _watched(model, batches(dist.get_rank(), 5), SAM(rho=0.3, sync_first_pass=True))
    expected = _watched(Network(), union(5), SAM(rho=0.3))
    assert_close(ours, expected, rtol=1e-8, atol=1e-11)


@two_ranks
def test_flat_parameters_are_refused() -> None:
    """They hold padding between the weights, which would count as entries."""
    model = SHARDED['fsdp1-FULL_SHARD-flat'](Network())
    with pytest.raises(ValueError, match='use_orig_params=True'):
        _watched(model, batches(dist.get_rank(), 1), SAM())


@two_ranks
def test_an_unsynchronised_gradient_is_averaged_first() -> None:
    """At lr 0 the plain gradient is the union's, whichever way each rank perturbs."""
    model = DistributedDataParallel(Network())
    ours = _watched(model, batches(dist.get_rank(), 1), SAM(rho=0.3))
    expected = _watched(Network(), union(1), SAM(rho=0.3))
    assert_close(ours[0][0], expected[0][0], rtol=1e-10, atol=0)
    assert ours[0][1] != expected[0][1]  # the ascent gradients are of two perturbations
    numbers = torch.tensor(ours)
    dist.all_reduce(numbers)
    assert_close(numbers, 2 * torch.tensor(ours), rtol=0, atol=0)

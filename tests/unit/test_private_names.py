"""A private name of torch that is gone is an error that says which one, and leaves nothing half done."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from composer_sam import SAM, SharpnessAwareOptimizer
from composer_sam.engine import scaling, wrappers
from tests.problems import Closure, batches, same


@pytest.fixture
def ddp(tmp_path: Path) -> Iterator[DistributedDataParallel]:
    """A replicated network of one process, with a buffer."""
    store = dist.FileStore(str(tmp_path / 'store'), 1)
    dist.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        yield DistributedDataParallel(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)))
    finally:
        dist.destroy_process_group()


def _message(what: str, name: str) -> str:
    """The version of torch, what it is about, and the name that is gone."""
    return rf'torch {torch.__version__.split("+")[0]}\S* keeps .*{what}.*{name}.*use a torch version'


def test_buffers_of_replicas(ddp: DistributedDataParallel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(DistributedDataParallel, '_sync_buffers')
    with pytest.raises(RuntimeError, match=_message('buffers of DistributedDataParallel', '_sync_buffers')):
        wrappers.broadcast_buffers(ddp)


def test_static_graphs_of_replicas(ddp: DistributedDataParallel) -> None:
    ddp.static_graph = True
    assert not hasattr(ddp, '_static_graph_delay_allreduce_enqueued')  # torch sets it with the static graph
    with pytest.raises(RuntimeError, match=_message('static graphs', '_static_graph_delay_allreduce_enqueued')):
        wrappers.must_synchronise(ddp)


class _Reducer:
    """A reducer that lacks what is asked of torch's."""


def test_the_reducer_of_replicas(ddp: DistributedDataParallel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddp, 'reducer', _Reducer())
    with pytest.raises(RuntimeError, match=_message('reducer', '_reset_state')):
        wrappers.to_rest(ddp)


def test_a_step_that_meets_a_missing_name_changes_no_weight(
    ddp: DistributedDataParallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(ddp.parameters(), lr=0.1), SAM(), ddp)
    before = copy.deepcopy(ddp.state_dict())
    monkeypatch.delattr(DistributedDataParallel, '_sync_buffers')
    with pytest.raises(RuntimeError, match='_sync_buffers'):
        optimizer.step(Closure(ddp, batches(1)[0]))
    assert same(before, ddp.state_dict())
    assert optimizer.steps_taken == 0


class _Scaler(torch.amp.GradScaler):
    """A scaler that keeps no record under the name known."""

    def __init__(self) -> None:
        super().__init__('cpu')
        del self._per_optimizer_states


def test_the_records_of_the_scaler() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    version = torch.__version__.split('+')[0]
    with pytest.raises(RuntimeError, match=rf"torch {version}\S*'s GradScaler .*_per_optimizer_states.*bfloat16"):
        scaling.finite(_Scaler(), optimizer)

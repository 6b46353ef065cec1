"""Checkpoints of shards: what a method remembers is loaded, in a Trainer and in a loop of one's own."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from composer.utils import FSDP2Config
from problem import METHODS, Network, batches, bits, closure_for, flat
from ranks import shared_folder, two_ranks
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from trainer_problem import fit

from composer_sam import LookSAM, SharpnessAwareOptimizer
from composer_sam.engine.load_planner import LoadPlanner
from tests.problems import made, mostly_slow


@two_ranks
def test_shards_of_a_run_without_the_method_are_loaded_with_it_and_the_other_way_round() -> None:
    """Also what was saved before the method remembered anything."""
    settings: dict[str, Any] = {'parallelism_config': {'fsdp': FSDP2Config()}}
    late = LookSAM(start='6ba')
    for saving, loading in (([], LookSAM()), ([LookSAM()], None), ([late], LookSAM(start='6ba'))):
        with shared_folder() as folder:
            first, _ = fit(*saving, save_folder=str(folder), save_interval='1ba', **settings)
            dist.barrier()
            methods = [] if loading is None else [loading]
            said = pytest.warns(UserWarning, match='LookSAM is not in the state_dict') if not saving else nullcontext()
            with said:
                second, drawn = fit(*methods, load_path=str(folder / 'ep1-ba5'), **settings)
        assert len(drawn.passes) == 3
        same = torch.equal(flat(first.state.model), flat(second.state.model))
        assert same is (saving == [late])


@two_ranks
@pytest.mark.parametrize('name', mostly_slow([n for n in METHODS if made(n).remembers]))
def test_shards_of_a_loop_of_ones_own_are_loaded_with_what_the_method_remembers(name: str) -> None:
    data = batches(dist.get_rank(), 6)

    def wrapped() -> tuple[nn.Module, SharpnessAwareOptimizer]:
        model = Network()
        fully_shard(model)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, SharpnessAwareOptimizer(base, made(name), model)

    model, optimizer = wrapped()
    for batch in data[:3]:
        optimizer.step(closure_for(optimizer, model, batch))
    with shared_folder() as folder:
        found: dict[str, Any] = dict(zip(('model', 'optim'), get_state_dict(model, optimizer), strict=True))
        checkpoint.save(found, checkpoint_id=folder)
        for batch in data[3:]:
            optimizer.step(closure_for(optimizer, model, batch))
        again, resumed = wrapped()
        found = dict(zip(('model', 'optim'), get_state_dict(again, resumed), strict=True))
        checkpoint.load(found, checkpoint_id=folder, planner=LoadPlanner())
        set_state_dict(again, resumed, model_state_dict=found['model'], optim_state_dict=found['optim'])
    resumed.steps_taken = 3
    for batch in data[3:]:
        resumed.step(closure_for(resumed, again, batch))
    assert all(torch.equal(*pair) for pair in zip(bits(again), bits(model), strict=True))


@two_ranks
def test_shards_of_another_model_are_refused() -> None:
    model = nn.Linear(4, 2)
    fully_shard(model)
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), LookSAM(), model)
    optimizer.zero_grad()
    with shared_folder() as folder:
        for parameter in model.parameters():
            optimizer.state[parameter]['sharpness_aware.g_v'] = parameter.detach().clone()
        found: dict[str, Any] = dict(zip(('model', 'optim'), get_state_dict(model, optimizer), strict=True))
        checkpoint.save(found, checkpoint_id=folder)
        other = {'model': {}, 'optim': {'state': {}}}
        with pytest.raises(CheckpointException, match='for bias, which the model does not have|for weight, which'):
            checkpoint.load(other, checkpoint_id=folder, planner=LoadPlanner())

"""Checkpoints: what a run with a method saves, and that stopping and going on leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_content import comparable
from composer import Trainer
from composer.optim import CosineAnnealingScheduler
from digits import METHODS, PER_EPOCH, Recorder, build, weights

from composer_sam import SAM, SGDHess, SharpnessAwareOptimizer, registry
from composer_sam.engine.step import MEMORY_PREFIX
from tests.problems import made, mostly_slow

# A run resumed at the end of an epoch first finishes that epoch, without a batch, of which Composer warns.
pytestmark = [
    pytest.mark.filterwarnings('ignore:No batches were trained for global rank:UserWarning'),
    pytest.mark.filterwarnings('ignore:The ``compute`` method of metric Samples was called before:UserWarning'),
]
every_method = pytest.mark.parametrize('name', mostly_slow(METHODS))
every_optimizer = pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
BATCHES = 3 * PER_EPOCH


def start(*algorithms: Any, folder: Path | None = None, every: str = '1ba', **settings: Any) -> Trainer:
    """A run of three epochs with dropout, BatchNorm, augmentation, shuffling and a schedule."""
    if folder is not None:
        settings = {'save_folder': str(folder), 'save_interval': every, 'save_overwrite': True, **settings}
    return build(
        *algorithms,
        **{
            'max_duration': '3ep',
            'schedulers': CosineAnnealingScheduler(),
            'run_name': 'run',
            'resumable': True,
            **settings,
        },
    )


def state_of(trainer: Trainer) -> dict[str, Any]:
    return trainer.state.optimizers[0].state_dict()['state']


def assert_same_state(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


class _Stop(Exception):
    pass


def stop_at(batch: int) -> Recorder:
    """Ends the run with an error in ``batch``, before its first forward."""

    def fault(number: int, at: int, state: Any) -> None:
        del at, state
        if number == batch + 1:
            raise _Stop

    return Recorder(fault)


@every_method
@every_optimizer
@pytest.mark.parametrize('batch', [PER_EPOCH + 2, 2 * PER_EPOCH])
def test_resumed_by_load_path_equals_uninterrupted(name: str, optimizer: str, batch: int, tmp_path: Path) -> None:
    """Stopped within an epoch, between two perturbed steps, and at an epoch's end: bit-identical."""
    whole = start(registry[name](interval=4), optimizer=optimizer)
    whole.fit()
    part = start(registry[name](interval=4), folder=tmp_path, optimizer=optimizer, recorder=stop_at(batch))
    with pytest.raises(_Stop):
        part.fit()
    part.close()
    recorder = Recorder()
    resumed = start(
        registry[name](interval=4),
        optimizer=optimizer,
        recorder=recorder,
        load_path=str(tmp_path / f'ep{(batch - 1) // PER_EPOCH}-ba{batch}-rank0.pt'),
    )
    resumed.fit()
    assert len(recorder.passes) == BATCHES - batch
    for step, taken in enumerate(recorder.passes, batch + 1):
        assert made(name).fewest_passes <= taken <= made(name).passes if step % 4 == 0 else taken == 1
    assert torch.equal(weights(resumed), weights(whole))
    assert_same_state(state_of(resumed), state_of(whole))


@every_method
@every_optimizer
def test_the_last_checkpoint_of_a_resumed_run_is_the_uninterrupted_run_s(
    name: str, optimizer: str, tmp_path: Path
) -> None:
    """All of it, random streams included: what Composer's own tests ask of algorithms, and know its SAM to miss."""
    settings = {'optimizer': optimizer, 'every': '1ep'}
    start(registry[name](), folder=tmp_path / 'whole', **settings).fit()
    middle = tmp_path / 'whole' / 'ep1-ba4-rank0.pt'
    start(registry[name](), folder=tmp_path / 'resumed', load_path=str(middle), **settings).fit()
    whole, resumed = (
        comparable(torch.load(tmp_path / folder / 'ep3-ba12-rank0.pt', weights_only=False))
        for folder in ('whole', 'resumed')
    )
    assert whole.keys() == resumed.keys() == {'state', 'rng'}
    assert whole['rng'] == resumed['rng']
    for key in whole['state']:
        assert whole['state'][key] == resumed['state'][key], key
    assert whole['state']['model'] != comparable(saved(middle))['model']


@every_method
def test_resumed_by_autoresume_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    """Stopped twice, at places of which only the first has a checkpoint of its own."""
    whole = start(registry[name](interval=3))
    whole.fit()
    settings = {'folder': tmp_path, 'every': '2ba', 'autoresume': True}
    for batch in (4, 7):
        already = 0 if batch == 4 else 4
        part = start(registry[name](interval=3), recorder=stop_at(batch - already), **settings)
        with pytest.raises(_Stop):
            part.fit()
        part.close()
    recorder = Recorder()
    resumed = start(registry[name](interval=3), recorder=recorder, **settings)
    resumed.fit()
    assert len(recorder.passes) == BATCHES - 6
    assert torch.equal(weights(resumed), weights(whole))
    assert_same_state(state_of(resumed), state_of(whole))


@every_method
def test_resumed_inside_a_window_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    window: dict[str, Any] = {'start': '0.3dur', 'end': '10ba'}
    whole = start(registry[name](**window))
    whole.fit()
    start(registry[name](**window), folder=tmp_path).fit()
    resumed = start(registry[name](**window), load_path=str(tmp_path / 'ep1-ba6-rank0.pt'))
    resumed.fit()
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    'method',
    [
        lambda: SAM(rho=0.3, schedules={'rho': CosineAnnealingScheduler(alpha_f=0.1)}),
        lambda: SGDHess(interval_hessian=4),
    ],
    ids=['schedule', 'memory'],
)
def test_schedules_and_memory_go_on(method: Callable[[], Any], tmp_path: Path) -> None:
    """A radius that follows the run's time, and a method that keeps vectors between steps, stopped in between."""
    whole = start(method(), folder=tmp_path)
    whole.fit()
    resumed = start(method(), load_path=str(tmp_path / 'ep1-ba6-rank0.pt'))
    resumed.fit()
    assert torch.equal(weights(resumed), weights(whole))
    assert_same_state(state_of(resumed), state_of(whole))
    without = start(max_duration='3ep')
    without.fit()
    assert not torch.equal(weights(without), weights(whole))


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)['state']


def shapes(item: Any) -> Any:
    """The structure of nested containers, with tensors by shape and type."""
    if isinstance(item, torch.Tensor):
        return tuple(item.shape), item.dtype
    if isinstance(item, dict):
        return {key: shapes(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [shapes(value) for value in item]
    return type(item)


def without_memory(item: Any) -> Any:
    """Nested containers without what a method keeps between steps."""
    if isinstance(item, dict):
        kept = {key: value for key, value in item.items() if not str(key).startswith(MEMORY_PREFIX)}
        assert kept.keys() == item.keys() or kept, 'a state of memory only'
        return {key: without_memory(value) for key, value in kept.items()}
    return [without_memory(value) for value in item] if isinstance(item, list) else item


@every_method
@every_optimizer
def test_a_checkpoint_is_the_base_run_s(name: str, optimizer: str, tmp_path: Path) -> None:
    """The same keys under the same optimizer name, the same tensors, the same size; beside them a method's memory."""
    for algorithms, folder in (([], 'plain'), ([registry[name]()], 'ours')):
        start(*algorithms, folder=tmp_path / folder, optimizer=optimizer, max_duration='2ba', every='2ba').fit()
    plain, ours = tmp_path / 'plain' / 'ep0-ba2-rank0.pt', tmp_path / 'ours' / 'ep0-ba2-rank0.pt'
    assert saved(ours)['optimizers'].keys() == {optimizer}
    assert shapes(without_memory(saved(ours)['optimizers'])) == shapes(saved(plain)['optimizers'])
    assert shapes(saved(ours)['model']) == shapes(saved(plain)['model'])
    # the difference is the name and the settings of one algorithm, and what the method keeps
    held = registry[name].held_copies
    tensors = list(saved(ours)['model'].values())
    memory = held * sum(tensor.nbytes + 1024 for tensor in tensors)  # with what torch says of every tensor
    assert abs(ours.stat().st_size - plain.stat().st_size) < 4096 + memory
    assert held == 0 or ours.stat().st_size > plain.stat().st_size


@every_method
@every_optimizer
def test_loads_without_the_method_and_the_other_way_round(name: str, optimizer: str, tmp_path: Path) -> None:
    """Momentum and moments are there from the first step on, in both directions."""
    for saving, loading in (([registry[name]()], []), ([], [registry[name]()])):
        first = start(
            *saving, folder=tmp_path, optimizer=optimizer, recorder=Recorder(), max_duration='5ba', every='5ba'
        )
        first.fit()
        expected = state_of(first)
        recorder = stop_at(0)
        path = str(tmp_path / 'ep1-ba5-rank0.pt')
        # Composer says so of every algorithm that the checkpoint does not name.
        said = pytest.warns(UserWarning, match=f'{name} is not in the state_dict') if loading else nullcontext()
        with said:
            second = start(*loading, optimizer=optimizer, recorder=recorder, load_path=path)
        with pytest.raises(_Stop):
            second.fit()
        assert isinstance(second.state.optimizers[0], SharpnessAwareOptimizer) is bool(loading)
        assert expected
        assert_same_state(state_of(second), expected)
        second.fit()
        assert second.state.timestamp.batch == BATCHES


@every_method
@every_optimizer
def test_a_checkpoint_before_the_first_step(name: str, optimizer: str, tmp_path: Path) -> None:
    """Saving makes the state of a fresh optimizer by a step that must not move anything."""
    recorder = stop_at(0)
    first = start(registry[name](), optimizer=optimizer, recorder=recorder)
    with pytest.raises(_Stop):
        first.fit()
    assert isinstance(first.state.optimizers[0], SharpnessAwareOptimizer)
    before = weights(first)
    path = first.save_checkpoint(str(tmp_path / 'first.pt'))
    assert path is not None
    assert torch.equal(weights(first), before)
    assert first.state.optimizers[0].param_groups[0]['lr'] > 0
    whole = start(registry[name](), optimizer=optimizer)
    whole.fit()
    resumed = start(registry[name](), optimizer=optimizer, load_path=path)
    resumed.fit()
    assert resumed.state.timestamp.batch == BATCHES
    assert torch.isfinite(weights(resumed)).all()


def test_the_schedule_goes_on(tmp_path: Path) -> None:
    recorders = [Recorder(), Recorder()]
    start(SAM(), folder=tmp_path, recorder=recorders[0]).fit()
    start(SAM(), recorder=recorders[1], load_path=str(tmp_path / 'ep1-ba6-rank0.pt')).fit()
    assert recorders[1].lr == recorders[0].lr[6:]

"""The Composer Trainer on two ranks: DistributedDataParallel, and Composer's FSDP2."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from composer import Callback, Trainer
from composer.algorithms import GradientClipping
from composer.core import State
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import FSDP2Config
from composer.utils import dist as composer_dist
from problem import METHODS, ONCE_DIFFERENTIATED, flat, sam_by_hand
from ranks import gathered, two_ranks
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from composer_sam import SAM, SharpnessAwareOptimizer, registry

PER_RANK = 8
BATCHES = 8
# Composer takes FSDP2 under the key 'fsdp'; it ignores 'fsdp2' without a word and trains unsharded.
FSDP2 = {'parallelism_config': {'fsdp': FSDP2Config()}}
every_method = pytest.mark.parametrize('name', METHODS)


class _Digits(ComposerModel):
    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.first = nn.Linear(64, 11)
            self.norm = nn.BatchNorm1d(11) if batch_norm else nn.Identity()
            self.last = nn.Linear(11, 10)
        self.first._fsdp_wrap = self.last._fsdp_wrap = True

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(batch[0]))))

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


class _Drawn(Callback):
    """The batches this rank was given, and the number of passes over each."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.passes: list[int] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        del logger
        self.batches.append(tuple(item.clone() for item in state.batch))
        self.passes.append(0)

    def before_forward(self, state: State, logger: Logger) -> None:
        del state, logger
        self.passes[-1] += 1


def _data() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    count = BATCHES * PER_RANK * dist.get_world_size() // 2
    return TensorDataset(torch.as_tensor(images[:count], dtype=torch.float32) / 16, torch.as_tensor(labels[:count]))


def _fit(*algorithms: Any, model: ComposerModel | None = None, **settings: Any) -> tuple[Trainer, _Drawn]:
    """Two epochs of four batches per rank."""
    model = _Digits() if model is None else model
    data, drawn = _data(), _Drawn()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(
            data, batch_size=PER_RANK, sampler=composer_dist.get_sampler(data, shuffle=True, drop_last=True)
        ),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        algorithms=list(algorithms),
        callbacks=[drawn],
        device='cpu',
        seed=3,
        progress_bar=False,
        **{'max_duration': '2ep', **settings},
    )
    trainer.fit()
    return trainer, drawn


def _of_all_ranks(drawn: _Drawn) -> list[list[tuple[Tensor, Tensor]]]:
    """Step by step every rank's batch."""
    images = gathered(torch.stack([x for x, _ in drawn.batches]))
    labels = gathered(torch.stack([y for _, y in drawn.batches]))
    return [[(x[step], y[step]) for x, y in zip(images, labels, strict=True)] for step in range(BATCHES)]


def _by_hand(data: list[list[tuple[Tensor, Tensor]]], rho: float, interval: int = 1) -> Tensor:
    model = _Digits().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = [[((x.double(), y), y) for x, y in of_step] for of_step in data]
    perturbs = lambda step: (step + 1) % interval == 0  # noqa: E731
    sam_by_hand(model, batches, rho, optimizer, nn.functional.cross_entropy, perturbs)
    return flat(model).float()


def _assert_ranks_equal(trainer: Trainer) -> None:
    weights = flat(trainer.state.model)
    assert all(torch.equal(weights, other) for other in gathered(weights)), 'the ranks hold different weights'


@two_ranks
@pytest.mark.parametrize('interval', [1, 3])
def test_ddp_is_m_sharpness(interval: int) -> None:
    trainer, drawn = _fit(SAM(rho=0.3, interval=interval))
    assert drawn.passes == [2 if step % interval == 0 else 1 for step in range(1, BATCHES + 1)]
    data = _of_all_ranks(drawn)
    assert not torch.equal(data[0][0][0], data[0][1][0])
    assert_close(flat(trainer.state.model), _by_hand(data, 0.3, interval), rtol=1e-4, atol=1e-6)
    _assert_ranks_equal(trainer)


@two_ranks
def test_ddp_with_synchronised_first_pass_is_one_process_on_the_union() -> None:
    trainer, drawn = _fit(SAM(rho=0.3, sync_first_pass=True))
    union = [[tuple(torch.cat(parts) for parts in zip(*of_step, strict=True))] for of_step in _of_all_ranks(drawn)]
    assert_close(flat(trainer.state.model), _by_hand(union, 0.3), rtol=1e-4, atol=1e-6)
    _assert_ranks_equal(trainer)


@two_ranks
@every_method
def test_ddp_ranks_stay_bit_identical(name: str) -> None:
    """With BatchNorm, micro-batches, clipping and an interval whose phase crosses the epoch."""
    interval = 1 if registry[name]().backwards_create_graph else 3
    trainer, drawn = _fit(
        registry[name](interval=interval),
        GradientClipping('norm', 0.5),
        model=_Digits(batch_norm=True),
        device_train_microbatch_size=PER_RANK // 2,
    )
    passes = registry[name]().passes
    assert drawn.passes == [2 * (passes if step % interval == 0 else 1) for step in range(1, BATCHES + 1)]
    _assert_ranks_equal(trainer)
    assert trainer.state.model.module.norm.num_batches_tracked == 2 * BATCHES


@two_ranks
@every_method
def test_ddp_buffers_are_the_plain_run_s(name: str) -> None:
    """DistributedDataParallel hands out rank 0's BatchNorm statistics, no matter which passes are synchronised."""
    settings = {'max_duration': '2ep', 'model': None}
    results = []
    for algorithms in ([], [registry[name]()]):
        settings['model'] = _Digits(batch_norm=True)
        for parameter in settings['model'].parameters():
            parameter.requires_grad_(False)
        settings['model'].last.bias.requires_grad_(True)  # statistics do not depend on it
        trainer, _ = _fit(*algorithms, **settings)
        results.append(trainer.state.model.module.norm)
    plain, ours = results
    assert torch.equal(plain.running_mean, ours.running_mean)
    assert torch.equal(plain.running_var, ours.running_var)


class _FailOnce(Callback):
    def __init__(self, batch: int, forward: int):
        self.remaining = {'batch': batch, 'forward': forward}
        self.weights: Tensor | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        del logger
        self.remaining['batch'] -= 1
        if self.remaining['batch'] == 0:
            self.weights = flat(state.model)

    def before_forward(self, state: State, logger: Logger) -> None:
        del state, logger
        if self.remaining['batch'] == 0:
            self.remaining['forward'] -= 1
            if self.remaining['forward'] == 0:
                raise RuntimeError('injected')


@two_ranks
@every_method
@pytest.mark.parametrize('wrapper', ['ddp', 'fsdp2'])
def test_error_in_the_last_pass_on_both_ranks_restores_and_training_continues(name: str, wrapper: str) -> None:
    if wrapper == 'fsdp2' and name not in ONCE_DIFFERENTIATED:
        return
    settings = FSDP2 if wrapper == 'fsdp2' else {}
    model = _Digits()
    data, fault = _data(), _FailOnce(batch=3, forward=registry[name]().passes)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size=PER_RANK, sampler=composer_dist.get_sampler(data)),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        algorithms=[registry[name]()],
        callbacks=[fault],
        device='cpu',
        max_duration='2ep',
        progress_bar=False,
        **settings,
    )
    with pytest.raises(RuntimeError, match='injected'):
        trainer.fit()
    assert fault.weights is not None
    assert torch.equal(flat(trainer.state.model), fault.weights)
    trainer.fit()
    assert trainer.state.timestamp.batch == BATCHES
    _assert_ranks_equal(trainer)
    assert torch.isfinite(flat(trainer.state.model)).all()


def _average_of_ones() -> float:
    """What FSDP2's reduction of fp32 gradients makes of ones: gloo adds where it is asked for the average."""
    average = torch.zeros(1)
    dist.reduce_scatter_tensor(average, torch.ones(dist.get_world_size()), op=dist.ReduceOp.AVG)
    return average.item()


@two_ranks
@pytest.mark.parametrize('name', ONCE_DIFFERENTIATED)
def test_composer_fsdp2_is_one_process_on_the_union(name: str) -> None:
    trainer, drawn = _fit(registry[name](interval=2), **FSDP2)
    assert all(isinstance(p, DTensor) for p in trainer.state.model.parameters())
    passes = registry[name]().passes
    assert drawn.passes == [passes if step % 2 == 0 else 1 for step in range(1, BATCHES + 1)]
    expected, scale = _Digits(), _average_of_ones()
    optimizer = SharpnessAwareOptimizer(
        torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9), registry[name](interval=2), expected
    )
    for of_step in _of_all_ranks(drawn):
        x, y = (torch.cat(parts) for parts in zip(*of_step, strict=True))

        def closure(batch: tuple[Tensor, Tensor] = (x, y)) -> Tensor:
            optimizer.zero_grad()
            loss = scale * expected.loss(expected(batch), batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_close(flat(trainer.state.model), flat(expected), rtol=1e-4, atol=1e-6)


@two_ranks
@pytest.mark.parametrize('wrapper', ['ddp', 'fsdp2-sharded', 'fsdp2-full'])
def test_resumed_on_two_ranks_equals_uninterrupted(wrapper: str) -> None:
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else '']
    dist.broadcast_object_list(folders)
    settings = {}
    if wrapper != 'ddp':
        settings = {'parallelism_config': {'fsdp': FSDP2Config(state_dict_type=wrapper.removeprefix('fsdp2-'))}}
    whole, _ = _fit(SAM(rho=0.3, interval=3), save_folder=folders[0], save_interval='1ba', **settings)
    assert any(isinstance(p, DTensor) for p in whole.state.model.parameters()) is (wrapper != 'ddp')
    dist.barrier()
    path = Path(folders[0]) / ('ep1-ba5' if wrapper == 'fsdp2-sharded' else 'ep1-ba5-rank0.pt')
    resumed, drawn = _fit(SAM(rho=0.3, interval=3), load_path=str(path), **settings)
    assert drawn.passes == [2, 1, 1]
    assert torch.equal(flat(resumed.state.model), flat(whole.state.model))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folders[0])

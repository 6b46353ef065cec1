"""Lightning on two ranks: DistributedDataParallel, FSDP1 and FSDP2, with and without accumulation."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip('lightning.pytorch', reason="lightning is not installed: pip install 'composer-sam[lightning]'")

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from problem import (
    METHODS,
    SYNCHRONISED,
    Network,
    assert_ranks_equal,
    base_of,
    batches,
    bits,
    by_passes,
    counted_reductions,
    flat,
    loss_of,
)
from ranks import two_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from composer_sam import SAM, FunctionalSAM, SharpnessAwareOptimizer
from composer_sam.methods.base import SharpnessAware as MethodOfComposerSAM
from composer_sam.trainers.lightning import SharpnessAware
from tests.problems import made, mostly_slow, needs_graph, network, same

Batch = tuple[Tensor, Tensor]
QUIET = {
    'enable_checkpointing': False,
    'enable_model_summary': False,
    'enable_progress_bar': False,
    'logger': False,
}


class Loader:
    """A rank's own batches, which are ready."""

    def __init__(self, data: Sequence[Batch]):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.data)


class Module(pl.LightningModule):
    """A module as a user writes it."""

    def __init__(self, net: nn.Module | None = None):
        super().__init__()
        self.net: Any = Network() if net is None else net
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return loss_of(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return base_of(self)

    def on_train_start(self) -> None:
        torch.manual_seed(3 + dist.get_rank())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs['loss'])


class Counts(pl.Callback):
    """Counts the reductions of a fit."""

    def __init__(self) -> None:
        self.reductions: list[str] = []
        self._counting = contextlib.ExitStack()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            self.reductions = self._counting.enter_context(counted_reductions(trainer.strategy.model))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._counting.close()


def fit(module: Module, data: Sequence[Batch], strategy: str | Strategy = 'ddp', **options: Any) -> None:
    """Fit a module on all ranks."""
    world_size = os.environ['WORLD_SIZE']
    try:
        pl.Trainer(accelerator='cpu', devices=2, strategy=strategy, max_epochs=1, **{**QUIET, **options}).fit(
            module, Loader(data)
        )
    finally:
        os.environ['WORLD_SIZE'] = world_size  # Lightning removes it


def fitted(
    method: MethodOfComposerSAM,
    data: Sequence[Batch],
    module: Module | None = None,
    strategy: str | Strategy = 'ddp',
    **options: Any,
) -> tuple[Module, SharpnessAware, list[str]]:
    """A module after a fit on all ranks, with the callback and the reductions."""
    module = Module() if module is None else module
    callback, counts = SharpnessAware(method), Counts()
    fit(module, data, strategy, callbacks=[counts, callback], **options)
    return module, callback, counts.reductions


@two_ranks
@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('name', mostly_slow(METHODS))
def test_its_steps_are_those_of_a_plain_loop_and_ranks_stay_equal(name: str, accumulate: int) -> None:
    interval = 1 if needs_graph(name) else 2
    data = batches(dist.get_rank(), 6 * accumulate)
    model = DistributedDataParallel(Network())
    optimizer = by_passes(made(name, interval=interval), data, model, accumulate)
    module, callback, _ = fitted(made(name, interval=interval), data, accumulate_grad_batches=accumulate)
    assert_ranks_equal(module)
    assert torch.equal(flat(module), flat(model))
    assert callback.optimizer is not None
    assert same(callback.optimizer.state_dict(), optimizer.state_dict())
    assert callback.optimizer.steps_perturbed == optimizer.steps_perturbed > 0


@two_ranks
@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('name', mostly_slow(SYNCHRONISED))
def test_a_first_pass_is_synchronised_where_that_is_asked_for(name: str, accumulate: int) -> None:
    data = batches(dist.get_rank(), 3 * accumulate)
    model = DistributedDataParallel(Network())
    by_passes(made(name, sync_first_pass=True), data, model, accumulate)
    module, _, _ = fitted(made(name, sync_first_pass=True), data, accumulate_grad_batches=accumulate)
    assert_ranks_equal(module)
    assert torch.equal(flat(module), flat(model))


@two_ranks
@pytest.mark.parametrize('accumulate', [1, 2, 3])
@pytest.mark.parametrize('sync', [False, True])
def test_gradient_synchronisations_per_step(sync: bool, accumulate: int) -> None:
    """One for SAM, not two, and one for a plain step, whatever the number of micro-batches."""
    data = batches(dist.get_rank(), 6 * accumulate)
    method = SAM(interval=2, sync_first_pass=sync)
    _, _, reductions = fitted(method, data, accumulate_grad_batches=accumulate)
    assert reductions == ['gradients'] * (6 + 3 * sync), reductions


@two_ranks
@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('name', ['SAM', 'GAM', 'MSAM', 'LookSAM'])
def test_buffers_and_random_numbers_are_those_of_a_plain_loop(name: str, accumulate: int) -> None:
    generator = torch.Generator().manual_seed(dist.get_rank())
    data = [
        (torch.randn(8, 6, generator=generator), torch.randint(4, (8,), generator=generator))
        for _ in range(4 * accumulate)
    ]
    model = DistributedDataParallel(network())
    by_passes(made(name), data, model, accumulate)
    module, _, _ = fitted(made(name), data, Module(network()), accumulate_grad_batches=accumulate)
    assert same(module.net.state_dict(), model.module.state_dict())


@two_ranks
def test_a_part_of_every_ranks_batch_finds_the_perturbation() -> None:
    method, data = SAM(ascent_fraction=0.5), batches(dist.get_rank(), 4)
    model = DistributedDataParallel(Network())
    by_passes(method, data, model)
    module, _, reductions = fitted(method, data)
    assert torch.equal(flat(module), flat(model))
    assert reductions == ['gradients'] * 4


class InADictionary(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return {'loss': super().training_step(batch, batch_idx), 'number': batch_idx}


@two_ranks
@pytest.mark.parametrize('accumulate', [1, 2])
def test_the_outputs_that_are_watched_are_the_modules_own(accumulate: int) -> None:
    """Lightning calls the module for every training step, too; what that returns is no output."""
    method, data = FunctionalSAM(), batches(dist.get_rank(), 4 * accumulate)
    model = DistributedDataParallel(Network())
    by_passes(method, data, model, accumulate)
    module, _, _ = fitted(method, data, InADictionary(), accumulate_grad_batches=accumulate)
    assert torch.equal(flat(module), flat(model))
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


@two_ranks
def test_with_a_static_graph() -> None:
    data = batches(dist.get_rank(), 4)
    model = DistributedDataParallel(Network(), static_graph=True)
    by_passes(SAM(), data, model)
    module, _, _ = fitted(SAM(), data, strategy=DDPStrategy(static_graph=True))
    assert_ranks_equal(module)
    assert torch.equal(flat(module), flat(model))


@two_ranks
@pytest.mark.parametrize('failing', [3, 4, 5, 6])
def test_an_error_on_both_ranks_leaves_no_trace_and_training_goes_on(failing: int) -> None:
    class Snaps(Module):
        before: Any = None

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2 and self.before is None:
                self.before = bits(self), random.getstate(), torch.get_rng_state()
                self.net.fault.arm('forward', failing - 2)

    data, module = batches(dist.get_rank(), 4), Snaps()
    with pytest.raises(RuntimeError, match='injected'):
        fitted(SAM(), data, module, accumulate_grad_batches=2)
    assert same(module.before, (bits(module), random.getstate(), torch.get_rng_state()))
    assert all(parameter.grad is None for parameter in module.parameters())
    expected = Module()
    expected.load_state_dict(module.state_dict())
    for one in (module, expected):
        one.losses.clear()
        fitted(SAM(), data, one, accumulate_grad_batches=2)
    assert torch.equal(flat(module), flat(expected))
    assert_ranks_equal(module)


@two_ranks
@pytest.mark.parametrize('name', ['SAM', 'MSAM'])
def test_manual_optimization_wraps_the_optimizer_itself(name: str) -> None:
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return SharpnessAwareOptimizer(base_of(self), made(name), self.trainer.model)

        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            optimizer: Any = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(self, batch)
                self.manual_backward(loss)
                return loss

            return optimizer.step(closure)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            pass

    data = batches(dist.get_rank(), 4)
    model = DistributedDataParallel(Network())
    by_passes(made(name), data, model)
    module = Manual()
    fit(module, data)
    assert_ranks_equal(module)
    assert torch.equal(flat(module), flat(model))


class FSDP1OnCPU(FSDPStrategy):
    """Lightning refuses FSDP1 without a GPU, though torch's works on CPUs if it is given the device."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return _fsdp1(model)


def _fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(
        model,
        use_orig_params=True,
        device_id=torch.device('cpu'),
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
    )


def _fsdp2(model: nn.Module, mesh: Any = None) -> nn.Module:
    for layer in (*model.children(), model):
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh)
    return model


class Sharded(InADictionary):
    """The whole weights as they are at the end of the fit."""

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # ModelParallelStrategy makes one
            _fsdp2(self.net, self.device_mesh['data_parallel'])

    def on_train_end(self) -> None:
        model = self.trainer.model
        assert model is not None
        self.whole = whole(model)


def whole(model: nn.Module) -> Tensor:
    if not isinstance(model, FullyShardedDataParallel):
        return flat(model)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters() if p.numel()])


@two_ranks
@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('sharding', ['fsdp1', 'fsdp2'])
@pytest.mark.parametrize('name', ['SAM', 'GAM', 'MSAM', 'LookSAM', 'FunctionalSAM'])
def test_on_shards_its_steps_are_those_of_a_plain_loop(name: str, sharding: str, accumulate: int) -> None:
    dtype = torch.float32  # the only full precision that Lightning knows under FSDP1
    data = batches(dist.get_rank(), 4 * accumulate, dtype)
    model = _fsdp1(Network(dtype)) if sharding == 'fsdp1' else _fsdp2(Network(dtype))
    by_passes(made(name), data, model, accumulate)
    module = Sharded(Network(dtype))
    strategy = FSDP1OnCPU() if sharding == 'fsdp1' else ModelParallelStrategy(2, 1)
    _, callback, _ = fitted(made(name), data, module, strategy, accumulate_grad_batches=accumulate)
    assert torch.equal(module.whole, whole(model))
    assert callback.optimizer is not None
    assert callback.optimizer.steps_taken == 4

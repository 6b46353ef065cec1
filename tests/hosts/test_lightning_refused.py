"""Lightning: what is refused, with what to do instead; and manual optimization, which wraps the optimizer itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip('lightning.pytorch', reason="lightning is not installed: pip install 'composer-sam[lightning]'")

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import XLAStrategy

from composer_sam import SAM, FunctionalSAM, SharpnessAwareOptimizer
from composer_sam.methods.base import SharpnessAware as MethodOfComposerSAM
from composer_sam.trainers.lightning import SharpnessAware
from composer_sam.trainers.lightning.checks import check
from tests.conformance.parts import loss_of
from tests.hosts.small_fits import (
    Batch,
    Loader,
    Module,
    by_passes,
    fitted,
    half,
    parameters_of,
    trainer,
    wrapped,
)
from tests.problems import BASES, batches, made, same


def test_what_is_not_a_method_is_refused() -> None:
    with pytest.raises(TypeError, match=r'one of composer_sam.s methods, for example SAM\(rho=0.05\), got 0.05'):
        SharpnessAware(0.05)  # pyright: ignore[reportArgumentType]


class Manual(Module):
    """A module that steps its optimizer itself."""

    def __init__(self, method: MethodOfComposerSAM | None = None):
        super().__init__()
        self.automatic_optimization = False
        self.method = method

    def configure_optimizers(self) -> Any:
        base = super().configure_optimizers()
        return base if self.method is None else SharpnessAwareOptimizer(base, self.method, self.trainer.model)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(self, batch)
            self.manual_backward(loss)
            return loss

        self.notes.losses.append(optimizer.step(closure))


def test_manual_optimization_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'Manual sets automatic_optimization=False.*SAM\(.*self.trainer.model\)'):
        fitted(tmp_path, SAM(), batches(1), Manual(), gradient_clip_val=None)


@pytest.mark.parametrize('name', ['SAM', 'GAM', 'MSAM', 'FunctionalSAM'])
def test_manual_optimization_wraps_the_optimizer_itself(tmp_path: Path, name: str) -> None:
    data = batches(4)
    model, _, _ = by_passes(made(name, interval=2), data, clip=None)
    module = Manual(made(name, interval=2))
    run = trainer(tmp_path, gradient_clip_val=None)
    run.fit(module, Loader(data))
    assert same(module.net.state_dict(), model.state_dict())
    assert run.global_step == 4


def test_a_part_of_the_batch_is_refused_with_accumulation(tmp_path: Path) -> None:
    method = SAM(ascent_fraction=0.5)
    with pytest.raises(ValueError, match=r'accumulate_grad_batches=2: Lightning loads micro-batches one at a time'):
        fitted(tmp_path, method, batches(2), accumulate_grad_batches=2)
    scheduler = GradientAccumulationScheduler({1: 2})
    module, callback = Module(), SharpnessAware(method)
    run = trainer(tmp_path, callback, scheduler, max_epochs=2)
    with pytest.raises(ValueError, match=r'accumulate_grad_batches=2'):
        run.fit(module, Loader(batches(2)))
    assert wrapped(callback).steps_taken == 2


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    class Unpacks(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch.pair, batch_idx)

    with pytest.raises(ValueError, match=r'ascent_fraction=0.5 cannot cut a batch of type SimpleNamespace'):
        data: Any = [SimpleNamespace(pair=pair) for pair in batches(2)]
        fitted(tmp_path, SAM(ascent_fraction=0.5), data, Unpacks())


@pytest.mark.filterwarnings('ignore:`LightningModule.configure_optimizers` returned `None`:UserWarning')
@pytest.mark.parametrize(
    ('configured', 'message'),
    [
        (lambda _: None, 'must return an optimizer of parameters that are trained'),
        (lambda module: SharpnessAwareOptimizer(BASES['SGD'](module.parameters()), SAM()), 'is wrapped already'),
        (lambda module: torch.optim.LBFGS(module.parameters()), 'evaluates its closure several times'),
        (lambda module: torch.optim.Adagrad(module.parameters()), 'perturbs along the momentum'),
    ],
)
def test_optimizers_that_cannot_be_wrapped_are_refused(tmp_path: Path, configured: Any, message: str) -> None:
    class Configured(Module):
        def configure_optimizers(self) -> Any:
            return configured(self)

    module = Configured()
    before = parameters_of(module)
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, made('MSAM'), batches(2), module)
    assert same(before, parameters_of(module))


@pytest.mark.filterwarnings('ignore:You are using the `dataloader_iter` step flavor:UserWarning')
def test_batches_that_are_taken_from_the_loader_are_refused(tmp_path: Path) -> None:
    class Takes(Module):
        def training_step(self, dataloader_iter: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(ValueError, match='Takes takes its batches from dataloader_iter'):
        fitted(tmp_path, SAM(), batches(2), Takes())


def test_strategies_that_step_themselves_are_refused() -> None:
    strategy = object.__new__(XLAStrategy)
    with pytest.raises(ValueError, match='XLAStrategy takes the step itself: use DDPStrategy'):
        check(SAM(), SimpleNamespace(strategy=strategy), Module())


def test_second_derivatives_of_scaled_losses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='SGDHess takes no grad_scaler'):
        fitted(tmp_path, made('SGDHess'), batches(1), plugins=[half(1.0)])


def test_outputs_that_are_watched_must_be_those_of_the_module(tmp_path: Path) -> None:
    class CallsItsNetwork(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return loss_of(self.net, batch)

    with pytest.raises(ValueError, match='it was never called'):
        fitted(tmp_path, FunctionalSAM(), batches(1), CallsItsNetwork())

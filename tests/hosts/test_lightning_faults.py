"""Lightning: an error or an interrupt in any pass of a step undoes the step."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('lightning.pytorch', reason="lightning is not installed: pip install 'composer-sam[lightning]'")

import lightning.pytorch as pl

from composer_sam import SAM
from composer_sam.trainers.lightning import SharpnessAware
from tests.hosts.small_fits import Batch, Loader, Module, assert_detached, by_passes, trainer, wrapped
from tests.problems import batches, made, network, same, snapshot


class Fails(Module):
    """Raises in one of its forwards; ``before`` is everything as it was before the second step."""

    def __init__(self, fault: BaseException, at: int, hook: str = ''):
        super().__init__()
        self.fault, self.at, self.hook = fault, at, hook
        self.before: Any = None

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.notes.forwards == self.at:
            raise self.fault
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            optimizer: Any = self.trainer.optimizers[0]
            self.before = snapshot(self.net, optimizer)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.hook and self.global_step == 1:
            raise self.fault


def assert_undone(module: Fails, callback: SharpnessAware, run: pl.Trainer) -> None:
    assert same(snapshot(module.net, wrapped(callback)), module.before)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert_detached(callback, run)


@pytest.mark.parametrize('name', ['SAM', 'GAM', 'MSAM', 'LookSAM', 'SGDHess'])
def test_an_error_in_any_forward_of_a_step_leaves_no_trace(tmp_path: Path, name: str) -> None:
    passes = made(name).passes
    for at in range(2 * passes + 1, 4 * passes + 1):
        module, callback = Fails(MemoryError('no memory'), at), SharpnessAware(made(name))
        run = trainer(tmp_path, callback, accumulate_grad_batches=2)
        try:
            run.fit(module, Loader(batches(4)))
        except MemoryError:
            assert_undone(module, callback, run)
        else:
            assert name == 'LookSAM'  # the method's second step takes fewer passes
            assert at > 2 * passes + 2


def test_an_error_between_the_passes_and_the_step_undoes_the_step(tmp_path: Path) -> None:
    module, callback = Fails(MemoryError('no memory'), 0, 'on_before_optimizer_step'), SharpnessAware(made('GAM'))
    run = trainer(tmp_path, callback, accumulate_grad_batches=2)
    with pytest.raises(MemoryError):
        run.fit(module, Loader(batches(4)))
    assert_undone(module, callback, run)


@pytest.mark.parametrize('at', [5, 6, 7, 8])
def test_an_interrupt_in_any_pass_leaves_no_trace(tmp_path: Path, at: int) -> None:
    module, callback = Fails(KeyboardInterrupt(), at), SharpnessAware(SAM(rho=0.1))
    run = trainer(tmp_path, callback, accumulate_grad_batches=2)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):  # Lightning shuts down and ends the program
            run.fit(module, Loader(batches(4)))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert run.interrupted
    assert_undone(module, callback, run)


def test_a_failed_run_can_be_fitted_again(tmp_path: Path) -> None:
    data = batches(4)
    module, callback = Fails(MemoryError('no memory'), 6), SharpnessAware(SAM(rho=0.1))
    with pytest.raises(MemoryError):
        trainer(tmp_path, callback).fit(module, Loader(data))
    module.net.load_state_dict(network().state_dict())
    trainer(tmp_path, callback).fit(module, Loader(data))
    model, _, _ = by_passes(SAM(rho=0.1), data)
    assert same(module.net.state_dict(), model.state_dict())
    assert wrapped(callback).steps_taken == 4

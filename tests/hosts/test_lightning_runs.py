"""Lightning: the window of perturbed steps, schedules, checkpoints, and several fits."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip('lightning.pytorch', reason="lightning is not installed: pip install 'composer-sam[lightning]'")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler, StochasticWeightAveraging

from composer_sam import SAM
from composer_sam.trainers.lightning import SharpnessAware
from tests.conformance.parts import loss_of
from tests.hosts.small_fits import (
    Batch,
    Loader,
    Module,
    Numbers,
    assert_detached,
    by_passes,
    fitted,
    parameters_of,
    trainer,
    wrapped,
)
from tests.problems import batches, made, same


@pytest.mark.parametrize(
    ('values', 'perturbed'),
    [
        ({'interval': 4}, '000100010001'),
        ({'start': '5ba'}, '000001111111'),
        ({'start': '1ep'}, '000011111111'),
        ({'start': '1ep', 'end': '2ep'}, '000011110000'),
        ({'end': '0.5dur'}, '111111000000'),
        ({'start': '0.25dur', 'end': '9ba', 'interval': 2}, '000101010000'),
    ],
)
def test_start_and_end_are_measured_in_steps_epochs_and_parts_of_the_run(
    tmp_path: Path, values: dict[str, Any], perturbed: str
) -> None:
    numbers = Numbers()
    method = SAM(**values)
    fitted(tmp_path, method, batches(8), logger=numbers, log_every_n_steps=1, max_epochs=3, accumulate_grad_batches=2)
    assert ''.join(f'{number:.0f}' for number in numbers.of('sam/perturbed')) == perturbed


def test_a_run_may_be_measured_in_steps(tmp_path: Path) -> None:
    _, callback, _ = fitted(tmp_path, SAM(start='0.5dur'), batches(3), max_epochs=-1, max_steps=10)
    assert (wrapped(callback).steps_taken, wrapped(callback).steps_perturbed) == (10, 5)


def test_a_run_of_unknown_length_has_no_parts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="start='0.5dur' needs"):
        fitted(tmp_path, SAM(start='0.5dur'), batches(3), max_epochs=-1)
    accumulating = GradientAccumulationScheduler({0: 2, 1: 1})
    with pytest.raises(ValueError, match="start='0.5dur' needs"):
        fitted(tmp_path, SAM(start='0.5dur'), batches(4), max_epochs=2, callbacks=[accumulating])


def test_accumulation_may_change_between_epochs(tmp_path: Path) -> None:
    data = batches(4)
    _, callback, _ = fitted(
        tmp_path, SAM(start='1ep'), data, max_epochs=2, callbacks=[GradientAccumulationScheduler({0: 2, 1: 1})]
    )
    assert (wrapped(callback).steps_taken, wrapped(callback).steps_perturbed) == (6, 4)


def test_a_run_without_a_perturbed_step_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, 'composer_sam'):
        fitted(tmp_path, SAM(start='5ep'), batches(2))
    assert "start='5ep' is never reached in a run of 2 steps" in caplog.text
    assert 'perturbed none of the 2 steps that were taken: they were plain steps of SGD' in caplog.text


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    'step': lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
    'epoch': lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5),  # three steps are an epoch
}


@pytest.mark.parametrize('unit', ['step', 'epoch'])
def test_learning_rates_follow_their_scheduler(tmp_path: Path, unit: str) -> None:
    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = SCHEDULES[unit](optimizer)
            if unit == 'epoch':
                schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return {'optimizer': optimizer, 'lr_scheduler': {'scheduler': schedule, 'interval': unit}}

    data = batches(6)
    model, _, _ = by_passes(made('WSAM'), data * 2, 2, schedule=SCHEDULES[unit])
    module, callback, _ = fitted(tmp_path, made('WSAM'), data, Scheduled(), max_epochs=2, accumulate_grad_batches=2)
    assert same(module.net.state_dict(), model.state_dict())
    assert wrapped(callback).param_groups[0]['lr'] < 0.05


# Checkpoints.


class Seeds(Module):
    """Checkpoints of Lightning have no random streams, so every step begins anew."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(self.global_step)


class Saves(Checkpoint):
    """Saves at the end of the first epoch, and has no state of its own."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('name', ['SAM', 'WSAM', 'GAM', 'MSAM', 'LookSAM', 'VaSSO'])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, name: str, accumulate: int) -> None:
    # Five steps are an epoch: the interval's phase goes on in its middle.
    data, values = Loader(batches(5 * accumulate)), {} if name == 'LookSAM' else {'interval': 3}
    path, options = tmp_path / 'first.ckpt', dict[str, Any](accumulate_grad_batches=accumulate)
    whole, callback, _ = fitted(tmp_path, made(name, **values), data, Seeds(), max_epochs=3, **options)
    _, first, _ = fitted(tmp_path, made(name, **values), data, Seeds(), callbacks=[Saves(path)], **options)
    resumed, second = Seeds(), SharpnessAware(made(name, **values))
    trainer(tmp_path, second, max_epochs=3, **options).fit(resumed, data, ckpt_path=path)
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(wrapped(second).state_dict(), wrapped(callback).state_dict())
    assert wrapped(first).steps_perturbed + wrapped(second).steps_perturbed == wrapped(callback).steps_perturbed


def test_a_checkpoint_loads_with_and_without_the_callback(tmp_path: Path) -> None:
    data, runs = Loader(batches(4)), dict[tuple[str, ...], Module]()
    with_and_without: dict[str, Callable[[], list[pl.Callback]]] = {
        'without': list,
        'with': lambda: [SharpnessAware(SAM(rho=0.1))],
    }
    for first, callbacks in with_and_without.items():
        path = tmp_path / f'{first}.ckpt'
        trainer(tmp_path, *callbacks(), Saves(path)).fit(Seeds(), data)
        assert torch.load(path, weights_only=False)['callbacks'] == {}
        for second, others in with_and_without.items():
            runs[first, second] = Seeds()
            run = trainer(tmp_path, *others(), max_epochs=2)
            run.fit(runs[first, second], data, ckpt_path=path)
            assert run.global_step == 8
    ends = [parameters_of(module) for module in runs.values()]
    assert not any(same(ends[place], end) for place in range(4) for end in ends[:place])


# Several fits.


def test_a_trainer_may_fit_again_validate_and_test(tmp_path: Path) -> None:
    class Validates(Module):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self.log('validated', loss_of(self, batch))

        test_step = validation_step

    data = batches(4)
    module, callback = Validates(), SharpnessAware(SAM(rho=0.1, interval=3))
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(module, Loader(data), Loader(data))
    assert_detached(callback, run)
    assert wrapped(callback).steps_perturbed == 1
    before = parameters_of(module)
    run.validate(module, Loader(data), verbose=False)
    run.test(module, Loader(data), verbose=False)
    assert same(before, parameters_of(module))
    run.fit_loop.max_epochs = 2
    run.fit(module, Loader(data), Loader(data))
    assert_detached(callback, run)
    assert (wrapped(callback).steps_taken, wrapped(callback).steps_perturbed) == (4, 1)  # the sixth of eight
    assert run.global_step == 8


def test_the_epoch_that_weight_averaging_adds_has_no_steps(tmp_path: Path) -> None:
    averaging = StochasticWeightAveraging(0.1, 1)
    method = made('MSAM', on_nonfinite='skip')
    module, callback, _ = fitted(tmp_path, method, batches(4), max_epochs=3, callbacks=[averaging])
    assert wrapped(callback).steps_taken == 12
    counted = module.net[1].num_batches_tracked
    assert counted == 4  # of the added epoch


def test_a_run_that_stops_between_micro_batches_leaves_a_whole_state(tmp_path: Path) -> None:
    class Stops(Module):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            self.trainer.should_stop = batch_idx == 4

    data = batches(9)
    model, _, _ = by_passes(made('MSAM'), data[:3], 3)
    loss_of(model, data[3])
    loss_of(model, data[4])
    module, callback, run = fitted(tmp_path, made('MSAM'), data, Stops(), accumulate_grad_batches=3)
    assert run.global_step == 1
    assert not wrapped(callback).under_way
    assert same(parameters_of(module.net), parameters_of(model))
    assert module.net[1].num_batches_tracked == model.state_dict()['1.num_batches_tracked'] == 5


def test_the_callback_can_be_copied_and_pickled() -> None:
    callback = SharpnessAware(SAM(rho=0.2))
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert repr(copied.method) == 'SAM(rho=0.2)'


def run_alone(script: str) -> list[str]:
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_package_imports_no_lightning() -> None:
    script = 'import sys, composer_sam\ncomposer_sam.SAM, composer_sam.SharpnessAwareOptimizer\nprint(*sys.modules)'
    modules = run_alone(script)
    assert 'composer_sam' in modules
    assert 'lightning' not in modules


def test_the_older_package_is_used_where_it_alone_is_imported() -> None:
    pytest.importorskip('pytorch_lightning', reason='the older package is not installed')
    script = """
import sys
import pytorch_lightning as pl
import torch
from composer_sam import SAM
from composer_sam.trainers.lightning import SharpnessAware

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

callback = SharpnessAware(SAM())
pl.Trainer(max_epochs=1, accelerator='cpu', barebones=True, callbacks=[callback]).fit(Model(), torch.randn(4, 8, 3))
print(callback.optimizer.steps_perturbed, 'lightning.pytorch' in sys.modules)
"""
    assert run_alone(script) == ['4', 'False']

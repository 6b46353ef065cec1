"""Lightning: its automatic optimization ends in the bits of a plain loop, and what it logs is from the first pass."""

from __future__ import annotations

import copy
import logging
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip('lightning.pytorch', reason="lightning is not installed: pip install 'composer-sam[lightning]'")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import XLAStrategy
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from composer_sam import SAM, FunctionalSAM, SharpnessAwareOptimizer
from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware as MethodOfComposerSAM
from composer_sam.trainers.batches import MicroBatches
from composer_sam.trainers.lightning import SharpnessAware
from composer_sam.trainers.lightning.checks import check
from composer_sam.vectors import axpy
from tests.conformance.parts import METHODS, loss_of
from tests.problems import BASES, batches, made, network, same, snapshot

# Lightning: it asks for the leaves of its loaders in a way that torch 2.15 calls old.
pytestmark = pytest.mark.filterwarnings(r'ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning')

Batch = tuple[Tensor, Tensor]
CLIP = 0.05


class Loader:
    """Batches that are ready; ``before`` is called when one is loaded."""

    def __init__(self, data: Sequence[Batch], before: Callable[[], object] = lambda: None):
        self.data, self.before = data, before

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.data:
            self.before()
            yield batch


class Module(pl.LightningModule):
    """A module as a user writes it, and the losses that Lightning hands to callbacks."""

    def __init__(self, base: str = 'SGD', seed: int = 3, dropout: float = 0.25):
        super().__init__()
        self.net = network(dropout=dropout)
        self.base, self.seed = base, seed
        self.notes = SimpleNamespace(losses=[], forwards=0, stream=None)  # of a class that is not put back

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.notes.forwards += 1
        return loss_of(self, batch)

    def configure_optimizers(self) -> Any:
        return BASES[self.base](self.net.parameters())

    def on_train_start(self) -> None:
        torch.manual_seed(self.seed)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.notes.losses.append(outputs['loss'] if outputs else None)

    def on_train_end(self) -> None:
        self.notes.stream = torch.get_rng_state()


class Numbers(Logger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return 'numbers'

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def of(self, name: str) -> list[float]:
        return [row[name] for _, row in self.rows if name in row]


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            'accelerator': 'cpu',
            'devices': 1,
            'callbacks': list(callbacks),
            'default_root_dir': folder,
            'enable_checkpointing': any(isinstance(callback, Checkpoint) for callback in callbacks),
            'enable_model_summary': False,
            'enable_progress_bar': False,
            'gradient_clip_val': CLIP,
            'logger': False,
            'max_epochs': 1,
            **options,
        }
    )


def fitted(
    folder: Path, method: MethodOfComposerSAM, data: Any, module: Module | None = None, **options: Any
) -> tuple[Module, SharpnessAware, pl.Trainer]:
    """A module after a fit with the method, with the callback and the Trainer."""
    module = Module() if module is None else module
    callback = SharpnessAware(method)
    run = trainer(folder, callback, *options.pop('callbacks', ()), **options)
    run.fit(module, data if isinstance(data, Loader) else Loader(data))
    return module, callback, run


def wrapped(callback: SharpnessAware) -> SharpnessAwareOptimizer:
    assert callback.optimizer is not None
    return callback.optimizer


def by_passes(
    method: MethodOfComposerSAM,
    data: Sequence[Batch],
    accumulate: int = 1,
    base: str = 'SGD',
    clip: float | None = CLIP,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[nn.Module, SharpnessAwareOptimizer, list[Tensor]]:
    """The same in a plain loop, whose base optimizer clips what it is given; with the losses of all micro-batches."""
    torch.manual_seed(3)
    model = network()
    made_base = BASES[base](model.parameters())
    if clip is not None:
        made_base.register_step_pre_hook(lambda *_: _nothing(nn.utils.clip_grad_norm_(model.parameters(), clip)))
    scheduler = None if schedule is None else schedule(made_base)
    optimizer = SharpnessAwareOptimizer(made_base, method, model, scaler)
    losses: list[Tensor] = []
    for first in range(0, len(data), accumulate):
        for number in optimizer.passes():
            optimizer.zero_grad()
            for batch in data[first : first + accumulate]:
                with torch.autocast('cpu', autocast, enabled=autocast is not None):
                    loss = loss_of(model, number.part(batch)) / accumulate
                scaled = loss if scaler is None else scaler.scale(loss)
                scaled.backward(create_graph=method.backwards_create_graph)  # pyright: ignore[reportAttributeAccessIssue]
                if number == (0 if method.ascent_fraction == 1 else 1):
                    losses.append(loss.detach())
        if scaler is not None:
            scaler.update()
        if scheduler is not None:
            scheduler.step()
    return model, optimizer, losses


def _nothing(_: Any) -> None:
    """A hook must return nothing."""


def parameters_of(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def state_of(optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy(optimizer.state_dict())


def assert_same_run(
    folder: Path, method: MethodOfComposerSAM, data: Sequence[Batch], accumulate: int = 1, base: str = 'SGD'
) -> None:
    model, optimizer, losses = by_passes(method, data, accumulate, base)
    end = torch.get_rng_state()
    module, callback, _ = fitted(folder, method, data, Module(base), accumulate_grad_batches=accumulate)
    assert same(module.net.state_dict(), model.state_dict())
    assert same(wrapped(callback).state_dict(), optimizer.state_dict())
    assert same(module.notes.losses, losses)
    assert torch.equal(module.notes.stream, end)
    assert wrapped(callback).steps_perturbed == optimizer.steps_perturbed > 0


@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('name', METHODS)
def test_its_steps_are_those_of_a_plain_loop(tmp_path: Path, name: str, accumulate: int) -> None:
    values: dict[str, Any] = {} if name in ('LookSAM', 'AESAM') else {'interval': 2}
    assert_same_run(tmp_path, made(name, **values), batches(6 * accumulate), accumulate)


def test_with_adamw_and_a_smaller_last_step(tmp_path: Path) -> None:
    assert_same_run(tmp_path, SAM(rho=0.1), batches(8), 3, 'AdamW')


def test_the_trainer_tells_a_method_the_length_of_the_run(tmp_path: Path) -> None:
    data = batches(6)
    model, _, _ = by_passes(made('AESAM', total_steps=3), data, 2)
    module, _, _ = fitted(tmp_path, made('AESAM', total_steps=None), data, accumulate_grad_batches=2)
    assert same(module.net.state_dict(), model.state_dict())


@pytest.mark.parametrize('name', ['SAM', 'ASAM'])
def test_a_part_of_the_batch_finds_the_perturbation(tmp_path: Path, name: str) -> None:
    assert_same_run(tmp_path, made(name, ascent_fraction=0.4), batches(4))


def test_every_pass_goes_through_all_micro_batches_and_clipping_is_done_once(tmp_path: Path) -> None:
    class Clips(Module):
        clipped = 0

        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            self.clipped += 1
            super().configure_gradient_clipping(*args, **kwargs)

    module, _, _ = fitted(tmp_path, made('GAM'), batches(6), Clips(), accumulate_grad_batches=3)
    assert module.notes.forwards == 6 * made('GAM').passes
    assert module.clipped == 2


# Precision.


def half(scale: float) -> MixedPrecision:
    return MixedPrecision('16-mixed', 'cpu', torch.amp.GradScaler('cpu', init_scale=scale, growth_interval=2))


@pytest.mark.parametrize('name', ['SAM', 'GAM', 'MSAM', 'LookSAM'])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_16_mixed_scales_and_unscales_every_pass(tmp_path: Path, name: str, accumulate: int) -> None:
    data, method = batches(6 * accumulate), made(name, interval=1 if name == 'LookSAM' else 2)
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0, growth_interval=2)
    model, optimizer, losses = by_passes(method, data, accumulate, autocast=torch.half, scaler=scaler)
    plugin = half(1024.0)
    module, callback, _ = fitted(tmp_path, method, data, plugins=[plugin], accumulate_grad_batches=accumulate)
    assert same(module.net.state_dict(), model.state_dict())
    assert same(wrapped(callback).state_dict(), optimizer.state_dict())
    assert same(module.notes.losses, losses)
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == scaler.get_scale() == 1024.0 * 2**3


@pytest.mark.parametrize('values', [{}, {'ascent_fraction': 0.5}, {'interval': 2}])
@pytest.mark.parametrize('bad', [1, 2])
def test_an_overflow_in_any_pass_skips_the_step_and_lowers_the_scale(
    tmp_path: Path, values: dict[str, Any], bad: int
) -> None:
    class Overflows(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx == 2 and self.notes.forwards == first + bad else loss

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            states.append((parameters_of(self), state_of(self.optimizers().optimizer)))  # pyright: ignore

    first = 2 + (2 if values.get('interval', 1) == 1 else 1)
    states: list[tuple[list[Tensor], Any]] = []
    plugin = half(1024.0)
    if bad == 2 and 'interval' in values:
        pytest.skip('a plain step has one pass')
    module, callback, run = fitted(tmp_path, SAM(rho=0.1, **values), batches(4), Overflows(), plugins=[plugin])
    if values.get('interval', 1) == 1:
        assert first == 4
    assert same(states[2], states[3])
    assert not same(states[1], states[2])
    assert not same(parameters_of(module), states[3][0])
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 1024.0  # doubled after two steps, halved after the third
    assert wrapped(callback).steps_taken == 3
    assert run.global_step == 4  # as Lightning counts


def test_bf16_mixed(tmp_path: Path) -> None:
    data, method = batches(6), made('GSAM')
    model, _, losses = by_passes(method, data, 2, autocast=torch.bfloat16)
    module, _, _ = fitted(tmp_path, method, data, precision='bf16-mixed', accumulate_grad_batches=2)
    assert same(module.net.state_dict(), model.state_dict())
    assert same(module.notes.losses, losses)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_loss_that_is_not_finite_skips_the_step_where_that_is_asked_for(tmp_path: Path, accumulate: int) -> None:
    data = batches(3 * accumulate)
    data[accumulate] = data[accumulate][0] * torch.nan, data[accumulate][1]
    method = SAM(rho=0.1, on_nonfinite='skip')
    model, optimizer, _ = by_passes(method, data, accumulate)
    module, callback, _ = fitted(tmp_path, method, data, accumulate_grad_batches=accumulate)
    assert same(module.net.state_dict(), model.state_dict())
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert wrapped(callback).steps_taken == optimizer.steps_taken == 2


# Logging.


class Logs(Module):
    """A module that logs in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()  # adds to its state in place
        self.accuracy = MulticlassAccuracy(4)
        self.several = MetricCollection([MulticlassAccuracy(4), MulticlassF1Score(4)])  # they share a state
        self.outputs: list[Tensor] = []

        self.predicted: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        x, y = batch
        loss, predicted = super().training_step(batch, batch_idx), self(x).argmax(1)
        self.log('loss', loss, on_step=True, on_epoch=True)
        self.log_dict({'both': loss, 'forwards': float(self.notes.forwards)})
        self.mean.update(loss.detach())
        self.log('mean_epoch', self.mean, on_step=False, on_epoch=True)
        self.accuracy(predicted, y)
        self.log('accuracy', self.accuracy, on_step=True, on_epoch=True)
        self.several.update(predicted, y)
        self.outputs.append(loss.detach())
        assert self.logger is not None
        self.logger.log_metrics({'own': loss.item()}, step=self.global_step)
        return {'loss': loss, 'predicted': predicted}

    def on_after_backward(self) -> None:
        self.log('backwards', float(self.notes.forwards))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.predicted.append(outputs['predicted'])


class Watches(pl.Callback):
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.log('watched', float(pl_module.notes.forwards))


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('name', ['SAM', 'GAM'])
def test_what_is_logged_and_measured_is_of_the_first_pass(tmp_path: Path, name: str, accumulate: int) -> None:
    data, numbers = batches(4 * accumulate), Numbers()
    module, _, run = fitted(
        tmp_path,
        made(name),
        data,
        Logs(),
        logger=numbers,
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
        callbacks=[Watches()],
    )
    assert isinstance(module, Logs)
    at_w = [loss * accumulate for loss in module.notes.losses]
    ends = range(accumulate - 1, len(at_w), accumulate)
    assert len(at_w) == 4 * accumulate
    assert same(module.outputs, at_w)
    assert numbers.of('own') == [loss.item() for loss in at_w]
    assert numbers.of('loss_step') == numbers.of('both') == [at_w[end].item() for end in ends]
    forwards = [float(step * accumulate * made(name).passes + accumulate) for step in range(4)]
    assert numbers.of('forwards') == numbers.of('backwards') == numbers.of('watched') == forwards
    mean = torch.stack(at_w).mean().item()
    assert [*numbers.of('loss_epoch'), *numbers.of('mean_epoch')] == [pytest.approx(mean)] * 2
    measured, accuracy = MulticlassAccuracy(4), MetricCollection([MulticlassAccuracy(4), MulticlassF1Score(4)])
    for predicted, (_, y) in zip(module.predicted, data, strict=True):
        measured.update(predicted, y)
        accuracy.update(predicted, y)
    assert same(module.several.compute(), accuracy.compute())
    assert run.callback_metrics['accuracy_epoch'] == measured.compute()
    assert module.several['MulticlassF1Score'].update_count == len(data)


def test_metrics_of_a_step_that_failed_are_as_before_it(tmp_path: Path) -> None:
    class Fails(Logs):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            found = super().training_step(batch, batch_idx)
            if self.notes.forwards == 2 * made('GAM').passes:
                raise MemoryError('no memory')
            return found

    module = Fails()
    with pytest.raises(MemoryError):
        fitted(tmp_path, made('GAM'), batches(2), module, logger=Numbers(), log_every_n_steps=1)
    assert module.mean.update_count == 1
    assert same(module.outputs, module.notes.losses)
    assert module.mean.compute() == module.notes.losses[0]


def test_the_loggers_get_the_numbers_of_a_step(tmp_path: Path) -> None:
    numbers = Numbers()
    fitted(tmp_path, SAM(rho=0.2, interval=2), batches(6), logger=numbers, log_every_n_steps=3)
    own = [(step, row) for step, row in numbers.rows if 'sam/interval_phase' in row]
    assert [step for step, _ in own] == [2, 5]
    (_, plain), (_, perturbed) = own
    assert plain == {'sam/perturbed': 0.0, 'sam/interval_phase': 1}
    assert perturbed['sam/perturbed'] == 1.0
    assert perturbed['sam/rho'] == 0.2
    assert perturbed['sam/gradient_norm'] > 0
    assert perturbed['sam/perturbed_loss'] > 0


# Time.


def losses_of_plain_steps(record: list[tuple[int | None, dict[str, float]]]) -> list[int]:
    return [int(row['sam/perturbed']) for _, row in record if 'sam/perturbed' in row]


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


# What comes between micro-batches, and errors.


@pytest.mark.filterwarnings('ignore:`training_step` returned `None`:UserWarning')
@pytest.mark.parametrize('none', [-1, 1])
@pytest.mark.parametrize('name', ['MSAM', 'DPSAT', 'SAM'])
def test_validation_between_micro_batches_sees_w(tmp_path: Path, name: str, none: int) -> None:
    class Validates(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 3 == none else loss

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            seen.append(parameters_of(self))
            self.log('validated', loss_of(self, batch))

    seen: list[list[Tensor]] = []
    data = batches(9)
    model, _, _ = by_passes(made(name), data, 3)
    module = Validates()
    callback = SharpnessAware(made(name))
    run = trainer(tmp_path, callback, accumulate_grad_batches=3, val_check_interval=1, num_sanity_val_steps=0)
    run.fit(module, Loader(data), Loader(data[:1]))
    assert same(module.net.state_dict(), model.state_dict()) == (none < 0)
    assert len(seen) == 9
    for step in range(2):  # after two micro-batches of a step, and the last one of the step before
        assert same(seen[3 * step + 2], seen[3 * step + 3])
        assert same(seen[3 * step + 2], seen[3 * step + 4])
        assert not same(seen[3 * step + 2], seen[3 * step + 5])


def test_loading_that_draws_random_numbers_changes_no_mask(tmp_path: Path) -> None:
    module, masks = Module(), list[Tensor]()
    module.net[3].register_forward_hook(lambda _, inputs, output: masks.append(torch.eq(output, 0)))
    fitted(tmp_path, made('GAM'), Loader(batches(6), lambda: torch.rand(5)), module, accumulate_grad_batches=3)
    passes = [torch.stack(masks[first : first + 3]) for first in range(0, len(masks), 3)]
    steps = passes[: made('GAM').passes], passes[made('GAM').passes :]
    assert all(torch.equal(step[0], masks) for step in steps for masks in step)
    assert not torch.equal(steps[0][0], steps[1][0])
    assert not torch.equal(passes[0][0], passes[0][1])


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_batch_that_is_changed_in_place_is_changed_once_per_pass(tmp_path: Path, accumulate: int) -> None:
    class Doubles(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            batch[0].mul_(2)
            return super().training_step(batch, batch_idx)

    data = batches(4)
    model, _, _ = by_passes(made('GAM'), [(2 * x, y) for x, y in data], accumulate)
    module, _, _ = fitted(tmp_path, made('GAM'), copy.deepcopy(data), Doubles(), accumulate_grad_batches=accumulate)
    assert same(module.net.state_dict(), model.state_dict())


@pytest.mark.filterwarnings('ignore:`training_step` returned `None`:UserWarning')
@pytest.mark.parametrize('skipped', [(1,), (0, 1), (3, 4), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize('amp', [False, True])
def test_micro_batches_without_a_loss_are_left_out(tmp_path: Path, skipped: tuple[int, ...], amp: bool) -> None:
    class Skips(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return None if batch_idx in skipped else super().training_step(batch, batch_idx)

    data, method = batches(6), made('GSAM')
    torch.manual_seed(3)
    model = network(dropout=0.0)
    base = BASES['SGD'](model.parameters())
    optimizer = SharpnessAwareOptimizer(base, method, model)
    for step in range(3):
        left = [data[place] for place in (2 * step, 2 * step + 1) if place not in skipped]
        if left and not (
            amp and 2 * step + 1 in skipped
        ):  # at 16-mixed Lightning steps only if the last one has a loss
            for _ in optimizer.passes():
                for batch in left:
                    (loss_of(model, batch) / 2).backward()
    module = Skips(dropout=0.0)
    options: dict[str, Any] = {'plugins': [full(1024.0)]} if amp else {}
    _, callback, _ = fitted(
        tmp_path, method, data, module, accumulate_grad_batches=2, gradient_clip_val=None, **options
    )
    assert same(parameters_of(module.net), parameters_of(model))
    assert wrapped(callback).steps_taken == optimizer.steps_taken


class Full(MixedPrecision):
    """A scaler, but no fp16."""

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast('cpu', enabled=False)


def full(scale: float) -> MixedPrecision:
    return Full('16-mixed', 'cpu', torch.amp.GradScaler('cpu', init_scale=scale))


def test_a_window_that_the_module_leaves_without_a_step_is_given_up(tmp_path: Path) -> None:
    class StepsRarely(Module):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    data = batches(6)
    torch.manual_seed(3)
    model = network()
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), made('GAM'), model)
    for place, batch in enumerate(data):
        if place % 2 == 0:
            loss_of(model, batch)  # buffers and random numbers are as after it
            continue
        for _ in optimizer.passes():
            optimizer.zero_grad()
            loss_of(model, batch).backward()
    module, callback, _ = fitted(tmp_path, made('GAM'), data, StepsRarely(), gradient_clip_val=None)
    assert same(module.net.state_dict(), model.state_dict())
    assert wrapped(callback).steps_taken == 3


def test_an_optimizer_step_may_call_the_closure_itself(tmp_path: Path) -> None:
    class CallsIt(Module):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer_closure()
            optimizer.step()

    model, _, _ = by_passes(made('GAM'), batches(4), 2)
    module, _, _ = fitted(tmp_path, made('GAM'), batches(4), CallsIt(), accumulate_grad_batches=2)
    assert same(module.net.state_dict(), model.state_dict())


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


def assert_detached(callback: SharpnessAware, run: pl.Trainer) -> None:
    assert not {'training_step', 'backward', 'optimizer_step'} & vars(run.strategy).keys()
    assert not {'log', 'log_dict'} & vars(run.lightning_module).keys()
    assert all(optimizer is wrapped(callback).base_optimizer for optimizer in run.optimizers)


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


def test_steps_that_are_not_perturbed_keep_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(MicroBatches, 'see', lambda self, batch: kept.append(batch))
    fitted(tmp_path, made('MSAM', interval=2), batches(8), accumulate_grad_batches=2)
    assert [batch_idx for _, batch_idx in kept] == [2, 3, 6, 7]


@dataclass(eq=False)
class Curved(SAM):
    """A rule that differentiates its second gradient again."""

    @property
    def backwards_create_graph(self) -> bool:
        return True

    def direction(self, step: Step) -> Passes:
        first = yield Pass(graph=True)
        first, _ = step.hessian_product(first, step.weights())
        second = yield Pass(at=step.offset(first, self.rho, self.epsilon), graph=True)
        second, product = step.hessian_product(second, step.weights())
        return Direction(axpy(0.1, product, second))


def test_any_pass_may_be_differentiated_again(tmp_path: Path) -> None:
    assert_same_run(tmp_path, Curved(rho=0.1), batches(6), 3)


# What is refused.


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


# The callback alone.


def test_the_callback_can_be_copied_and_pickled() -> None:
    callback = SharpnessAware(SAM(rho=0.2))
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert copied.method.rho == 0.2


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

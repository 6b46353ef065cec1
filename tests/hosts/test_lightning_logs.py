"""Lightning: what is logged, returned and measured with metrics is of a step's first pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip('lightning.pytorch', reason="lightning is not installed: pip install 'composer-sam[lightning]'")

import lightning.pytorch as pl
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from composer_sam import SAM
from tests.hosts.small_fits import Batch, Module, Numbers, fitted
from tests.problems import batches, made, same


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
    log: Any  # Lightning gives it to callbacks

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

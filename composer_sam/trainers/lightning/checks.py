"""What is refused before a run, and what is said of one."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from torch import nn

from composer_sam.engine.rule import Method
from composer_sam.engine.split_step import SplitOptimizer
from composer_sam.engine.wrappers import always_synchronises
from composer_sam.trainers.lightning.package import pl
from composer_sam.vectors.layout import is_first_rank

__all__ = ['check', 'check_fraction', 'report', 'warn_of_shards']

log = logging.getLogger(__name__)

_UNSUPPORTED = (pl.strategies.DeepSpeedStrategy, pl.strategies.XLAStrategy, pl.strategies.SingleDeviceXLAStrategy)


def check(method: Method, trainer: Any, module: Any) -> None:
    """Raise ValueError for what cannot be trained with the method."""
    strategy, name = trainer.strategy, type(module).__name__
    if not module.automatic_optimization:
        raise ValueError(
            f'{name} sets automatic_optimization=False, so it steps the optimizer itself: remove the callback, return '
            f'SharpnessAwareOptimizer(base, {method!r}, self.trainer.model) from configure_optimizers, and in '
            'training_step call self.optimizers().step(closure) with a closure that zeroes the gradients and calls '
            'self.manual_backward(loss)'
        )
    if isinstance(strategy, _UNSUPPORTED):
        raise ValueError(
            f'{type(strategy).__name__} takes the step itself: use DDPStrategy, FSDPStrategy or ModelParallelStrategy'
        )
    parameters = [p for optimizer in strategy.optimizers for group in optimizer.param_groups for p in group['params']]
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(f'configure_optimizers of {name} must return an optimizer of parameters that are trained')
    if 'dataloader_iter' in inspect.signature(module.training_step).parameters:
        raise ValueError(
            f'training_step of {name} takes its batches from dataloader_iter, so they cannot be given to it once per '
            'pass: write training_step(self, batch, batch_idx)'
        )
    check_fraction(method, trainer)


def check_fraction(method: Method, trainer: Any) -> None:
    """Raise ValueError if the first pass needs parts of micro-batches that are not loaded yet."""
    if method.ascent_fraction < 1 and trainer.accumulate_grad_batches > 1:
        raise ValueError(
            f'ascent_fraction={method.ascent_fraction} cannot be used with accumulate_grad_batches='
            f'{trainer.accumulate_grad_batches}: Lightning loads micro-batches one at a time, and the first pass needs '
            'a part of each before the loss is computed. Use larger batches instead of accumulating, or '
            'ascent_fraction=1'
        )


def warn_of_shards(method: Method, model: nn.Module) -> None:
    """Say that perturbations cannot differ between ranks where the model is sharded."""
    if always_synchronises(model) and not method.sync_first_pass and method.passes > 1 and is_first_rank():
        log.warning(
            'FSDP averages every gradient over the ranks, so all ranks of %s use the same perturbation: '
            'sync_first_pass=False, one perturbation per rank (m-sharpness), has no effect',
            type(method).__name__,
        )


def report(optimizer: SplitOptimizer) -> None:
    """Warn if training has ended without a perturbed step."""
    if optimizer.steps_taken and not optimizer.steps_perturbed and is_first_rank():
        log.warning(
            '%s perturbed none of the %d steps that were taken: they were plain steps of %s',
            optimizer.method,
            optimizer.steps_taken,
            type(optimizer.base_optimizer).__name__,
        )

"""What is refused before a run."""

from __future__ import annotations

import inspect
from typing import Any

from composer_sam.engine.rule import Method
from composer_sam.trainers.lightning.package import pl

__all__ = ['check', 'check_fraction']

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

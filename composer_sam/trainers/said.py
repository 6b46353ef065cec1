"""What trainers say of a run in the log, before it and after it."""

from __future__ import annotations

import logging

from torch import nn

from composer_sam.engine.optimizer import SharpnessAwareOptimizer
from composer_sam.engine.rule import Method
from composer_sam.engine.wrappers import always_synchronises
from composer_sam.vectors.layout import is_first_rank

__all__ = ['say_if_nothing_was_perturbed', 'say_if_ranks_cannot_differ']

log = logging.getLogger(__name__)


def say_if_ranks_cannot_differ(method: Method, model: nn.Module) -> None:
    """Warn where the model is sharded, so that no rank can perturb by its own gradient."""
    if always_synchronises(model) and not method.sync_first_pass and method.passes > 1 and is_first_rank():
        log.warning(
            'FSDP averages every gradient over the ranks, so all ranks of %s use the same perturbation: '
            'sync_first_pass=False, one perturbation per rank (m-sharpness), has no effect',
            type(method).__name__,
        )


def say_if_nothing_was_perturbed(optimizer: SharpnessAwareOptimizer) -> None:
    """Warn if a run has ended without a perturbed step."""
    if optimizer.steps_taken and not optimizer.steps_perturbed and is_first_rank():
        log.warning(
            '%s perturbed none of the %d steps that were taken: they were plain steps of %s',
            optimizer.method,
            optimizer.steps_taken,
            type(optimizer.base_optimizer).__name__,
        )

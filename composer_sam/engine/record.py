"""What one step did, for the host's logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from composer_sam.engine.moment import Moment
from composer_sam.engine.rule import Rule

__all__ = ['StepRecord']


@dataclass(frozen=True)
class StepRecord:
    """One step that was taken.

    Attributes:
        moment: when.
        rule: the method with its hyper-parameters as they were at this step; None for a step of the base optimizer.
        losses: the loss of every pass, as the closure returned it; empty in a loop over passes.
        gradient_norm: the L2 norm of the gradient the first radius was measured along, over the perturbed parameters;
            of this rank's gradient where the first pass is not synchronised. None where the method takes none.
    """

    moment: Moment
    rule: Rule | None
    losses: tuple[Any, ...]
    gradient_norm: Tensor | None

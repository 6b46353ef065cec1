"""Adaptive policy for SAM: a second pass only where the gradient is large for its history."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from composer_sam.engine.moment import Moment
from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import check_count, hyperparameter
from composer_sam.vectors import Number, dot

__all__ = ['AESAM']


@dataclass(eq=False)
class AESAM(SharpnessAware):
    r"""SAM with an adaptive policy: a second pass only in steps whose gradient is large for its history.

    With :math:`q = \lVert g \rVert^2` of the gradient averaged over ranks, at every step

    .. math::

        \mu \leftarrow \delta \mu + (1 - \delta) \, q, \qquad
        \sigma^2 \leftarrow \delta \sigma^2 + (1 - \delta) (q - \mu)^2, \qquad
        d = \begin{cases} \nabla L(w + \rho \, g / (\lVert g \rVert + \epsilon)) & q \ge \mu + c \, \sigma \\
        g & \text{otherwise} \end{cases}

    both from 0, and c goes linearly from :math:`\lambda_2` to :math:`\lambda_1` over the run: SAM late rather than
    early.

    Args:
        rho: radius of the perturbation, :math:`\rho > 0`, in the units of the weights' norm. May be set per group.
        lambda_1: :math:`\lambda_1`, the threshold c at the end of the run, any number.
        lambda_2: :math:`\lambda_2`, the threshold c at its beginning, any number.
        decay: :math:`\delta`, how slowly mean and variance move, :math:`0 \le \delta < 1`.
        total_steps: length of the run in steps, an integer >= 1, for loops of your own. None: the Trainer's
            ``max_duration``.
        epsilon: added to the norm, :math:`\epsilon \ge 0`. May be set per group.

    Passes and memory:
        2 passes in SAM's steps and 1 in the others; one copy of the parameters at the peak, two over ranks; two numbers
        between steps, in checkpoints too. All ranks decide alike: the first gradient is averaged in every step, besides
        the second backward's own collective, and the largest q of all ranks counts. The decision waits for the device.

    Settings:
        No published settings beyond the defaults. Ours took 1.53 passes per step with the defaults and 1.20 with
        ``lambda_1=1`` (benchmarks/results/thrift.md).

    Raises:
        ValueError: a hyper-parameter is out of its range, or nobody says how long the run is.

    Example:
        >>> from composer_sam import AESAM
        >>> algorithm = AESAM(rho=0.05)   # Trainer(algorithms=[algorithm])

    Reference:
        Jiang, Yang, Zhang, Kwok: An Adaptive Policy to Employ Sharpness-Aware Minimization, ICLR 2023,
        https://arxiv.org/abs/2304.14647
    """

    rho: Number = hyperparameter(0.05, gt=0)
    lambda_1: float = hyperparameter(-1.0, per_group=False)
    lambda_2: float = hyperparameter(1.0, per_group=False)
    decay: float = hyperparameter(0.9, ge=0, lt=1, per_group=False)
    total_steps: int | None = None
    epsilon: Number = hyperparameter(1e-12, ge=0)

    paper: ClassVar[str] = 'Jiang et al., ICLR 2023, https://arxiv.org/abs/2304.14647'
    when: ClassVar[str] = 'SAM is worth its price in a part of the steps only'
    extra_copies: ClassVar[int] = 1
    held_numbers: ClassVar[tuple[str, ...]] = ('mean', 'variance')
    varies: ClassVar[bool] = True
    passes_follow_data: ClassVar[bool] = True
    _elapsed = 0.0  # the part of the run that is over, in a resolved rule

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total_steps is not None:
            check_count('total_steps', self.total_steps)

    def check_host(self, units: Sequence[str]) -> None:
        super().check_host(units)
        if 'dur' not in units and self.total_steps is None:
            raise ValueError('AESAM follows the length of the run: without a Trainer, give it as total_steps')

    def resolved(self, moment: Moment, groups: Sequence[tuple[dict[str, Any], int]]) -> SharpnessAware:
        method = copy.copy(super().resolved(moment, groups))
        assert isinstance(method, AESAM)
        elapsed = moment.part() if self.total_steps is None else moment.batch / self.total_steps
        method._elapsed = min(elapsed, 1.0)
        return method

    def direction(self, step: Step) -> Passes:
        grad = yield Pass(sync=self.sync_first_pass)
        mean_grad = grad if self.sync_first_pass else step.mean(grad)
        q = step.agreed(dot(mean_grad, mean_grad))
        mean = self.decay * step.numbers.get('mean', 0.0) + (1 - self.decay) * q
        variance = self.decay * step.numbers.get('variance', 0.0) + (1 - self.decay) * (q - mean) ** 2
        step.staged_numbers.update(mean=mean, variance=variance)
        threshold = self.lambda_2 + (self.lambda_1 - self.lambda_2) * self._elapsed
        if q < mean + threshold * variance**0.5:
            return Direction(mean_grad)
        del mean_grad
        ascent_grad = yield Pass(at=step.offset(grad.donate(), self.rho, self.epsilon).donate())
        return Direction(ascent_grad)

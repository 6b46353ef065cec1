"""Variance-suppressed sharpness-aware optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import hyperparameter
from composer_sam.vectors import Number, axpy, complement, scale

__all__ = ['VaSSO']


@dataclass(eq=False)
class VaSSO(SharpnessAware):
    r"""Variance-suppressed SAM: perturbs along a moving average of the gradients, which varies less between batches.

    .. math::

        m \leftarrow (1 - \theta) \, m + \theta \, g, \qquad
        e = \rho \, \frac{m}{\lVert m \rVert + \epsilon}, \qquad
        w \leftarrow \text{base}(w, \nabla L(w + e))

    with m = g in the method's first step.

    Args:
        rho: radius of the perturbation, :math:`\rho > 0`, in the units of the weights' norm. May be set per group.
        theta: weight of the newest gradient, :math:`0 < \theta \le 1`; 1 is SAM with a synchronised first pass. May be
            set per group.
        epsilon: added to the norm, :math:`\epsilon \ge 0`. May be set per group.

    Passes and memory:
        2 passes per perturbing step, three copies of the parameters at the peak; one copy, m, between steps, in
        checkpoints too. m is the average over ranks, by one collective besides the second backward's own, so all ranks
        perturb alike.

    Settings:
        The authors' program, WRN-28-10 on CIFAR-100: rho 0.2, theta 0.9, with SGD at learning rate 0.1 and weight decay
        0.001.

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> from composer_sam import VaSSO
        >>> algorithm = VaSSO(rho=0.05, theta=0.4)   # Trainer(algorithms=[algorithm])

    Reference:
        Li, Giannakis: Enhancing Sharpness-Aware Optimization Through Variance Suppression, NeurIPS 2023,
        https://arxiv.org/abs/2309.15639
    """

    rho: Number = hyperparameter(0.05, gt=0)
    theta: Number = hyperparameter(0.4, gt=0, le=1)
    epsilon: Number = hyperparameter(1e-12, ge=0)

    paper: ClassVar[str] = 'Li and Giannakis, NeurIPS 2023, https://arxiv.org/abs/2309.15639'
    when: ClassVar[str] = 'batches are small, so that SAM perturbs along noise'
    first_pass_only_perturbs: ClassVar[bool] = True
    extra_copies: ClassVar[int] = 3
    held_copies: ClassVar[int] = 1

    def direction(self, step: Step) -> Passes:
        grad = yield Pass(sync=self.sync_first_pass, fraction=self.ascent_fraction)
        average = self.averaged(step, grad)
        if 'average' in step.memory:
            average = scale(average.donate(), self.theta)
            average = axpy(complement(self.theta), step.memory['average'], average.donate())
        step.staged['average'] = average
        ascent_grad = yield Pass(at=step.offset(average, self.rho, self.epsilon).donate())
        return Direction(ascent_grad)

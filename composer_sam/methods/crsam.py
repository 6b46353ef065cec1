"""Curvature-regularised sharpness-aware minimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import hyperparameter
from composer_sam.vectors import Number, axpy, each, scale

__all__ = ['CRSAM']


@dataclass(eq=False)
class CRSAM(SharpnessAware):
    r"""Curvature-regularised SAM: SAM with a penalty on the curvature along the perturbation.

    With g the gradient at w, p at w + e and m at w - e,

    .. math::

        e = \rho \, \frac{g}{\lVert g \rVert + \epsilon}, \qquad
        w \leftarrow \text{base}(w, \; p + \gamma \, (p + m - 2 g) + \beta \, (p - m))

    The second term is the gradient of the loss's second difference along e, the third that of its first.

    Args:
        rho: radius of the perturbation, :math:`\rho > 0`, in the units of the weights' norm. May be set per group.
        gamma: weight of the second difference, any number. May be set per group.
        beta: weight of the first difference, any number. May be set per group.
        epsilon: added to the norm, :math:`\epsilon \ge 0`. May be set per group.

    Passes and memory:
        3 passes per perturbing step, three copies of the parameters at the peak, nothing between steps. Over ranks all
        passes are unsynchronised, and the direction is averaged once; ``sync_first_pass=True`` synchronises all three.

    Settings:
        The authors' program, ResNet-18 on CIFAR-100: rho 0.1, gamma 0.1, beta 0.01, with SGD at learning rate 0.05,
        weight decay 0.001 and 200 epochs.

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> from composer_sam import CRSAM
        >>> algorithm = CRSAM(rho=0.05, gamma=0.1, beta=0.01)   # Trainer(algorithms=[algorithm])

    Reference:
        Wu, Luo, Wunsch: CR-SAM: Curvature Regularized Sharpness-Aware Minimization, AAAI 2024,
        https://arxiv.org/abs/2312.13555
    """

    rho: Number = hyperparameter(0.05, gt=0)
    gamma: Number = hyperparameter(0.1)
    beta: Number = hyperparameter(0.01)
    epsilon: Number = hyperparameter(1e-12, ge=0)

    paper: ClassVar[str] = 'Wu et al., AAAI 2024, https://arxiv.org/abs/2312.13555'
    when: ClassVar[str] = 'SAM at a large radius loses its first-order meaning, and a third pass is affordable'
    extra_copies: ClassVar[int] = 3

    def direction(self, step: Step) -> Passes:
        sync = self.sync_first_pass
        grad = yield Pass(sync=sync)
        ahead = yield Pass(at=step.offset(grad, self.rho, self.epsilon).donate(), sync=sync)
        # The offset is computed again instead of kept in memory during a pass.
        back = scale(step.offset(grad, self.rho, self.epsilon).donate(), -1.0)
        behind = yield Pass(at=back.donate(), sync=sync)
        direction = scale(ahead.donate(), each(_of_ahead, self.gamma, self.beta))
        direction = axpy(each(_of_behind, self.gamma, self.beta), behind, direction.donate())
        direction = axpy(each(_of_gradient, self.gamma), grad, direction.donate())
        return Direction(direction if sync else step.mean(direction.donate()))


def _of_ahead(gamma: float, beta: float) -> float:
    return 1 + gamma + beta


def _of_behind(gamma: float, beta: float) -> float:
    return gamma - beta


def _of_gradient(gamma: float) -> float:
    return -2 * gamma

"""Surrogate-gap guided sharpness-aware minimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import hyperparameter
from composer_sam.vectors import Number, reject, scale, subtract

__all__ = ['GSAM']


@dataclass(eq=False)
class GSAM(SharpnessAware):
    r"""Surrogate-gap guided SAM: lowers the perturbed loss, and its gap to the loss at w without raising either.

    With g the gradient at w and :math:`\tilde g` the gradient at :math:`w + \rho g / (\lVert g \rVert + \epsilon)`,

    .. math::

        v = g - \cos(g, \tilde g) \, \lVert g \rVert \, \frac{\tilde g}{\lVert \tilde g \rVert + \epsilon}, \qquad
        w \leftarrow \text{base}(w, \tilde g - \alpha v)

    v is the part of g that is orthogonal to :math:`\tilde g`.

    Args:
        rho: radius of the perturbation, :math:`\rho > 0`, in the units of the weights' norm. May be set per group. The
            paper lets it follow the learning rate: ``schedules={'rho': ...}``, with the scheduler of the learning rate.
        alpha: strength of the step that closes the gap, :math:`\alpha \ge 0`; 0 is SAM. May be set per group.
        adaptive: measure the radius in the scale of the weights, :math:`e = \rho w^2 g / (\lVert w g \rVert +
            \epsilon)`.
        epsilon: added to the norms, :math:`\epsilon \ge 0`.

    Passes and memory:
        2 passes per perturbing step, two copies of the parameters at the peak, nothing between steps. Over ranks one
        collective for the first gradient, besides the second backward's own.

    Departures:
        The authors' ``rho_min`` ties the radius to the learning rate inside the method; here any schedule does.

    Settings:
        The authors' PyTorch program, WRN-16-8 on CIFAR-10: ``adaptive=True``, rho 2.0, alpha 0.2. In the paper rho
        follows the learning rate from its largest to its smallest value.

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> from composer_sam import GSAM
        >>> algorithm = GSAM(rho=0.05, alpha=0.4)   # Trainer(algorithms=[algorithm])

    Reference:
        Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu: Surrogate Gap Minimization Improves
        Sharpness-Aware Training, ICLR 2022, https://arxiv.org/abs/2203.08065
    """

    rho: Number = hyperparameter(0.05, gt=0)
    alpha: Number = hyperparameter(0.4, ge=0)
    adaptive: bool = False
    epsilon: float = hyperparameter(1e-12, ge=0, per_group=False)

    paper: ClassVar[str] = 'Zhuang et al., ICLR 2022, https://arxiv.org/abs/2203.08065'
    when: ClassVar[str] = 'SAM helps, and you can tune one more number'
    extra_copies: ClassVar[int] = 2

    def direction(self, step: Step) -> Passes:
        grad = yield Pass(sync=self.sync_first_pass)
        offset = step.offset(grad, self.rho, self.epsilon, step.weights() if self.adaptive else None)
        mean_grad = self.averaged(step, grad)
        ascent_grad = yield Pass(at=offset.donate())
        orthogonal = reject(mean_grad.donate(), ascent_grad, self.epsilon)
        return Direction(subtract(ascent_grad.donate(), scale(orthogonal.donate(), self.alpha)))

"""Gradient-norm penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import hyperparameter
from composer_sam.vectors import Number, axpy, complement, scale, to_radius

__all__ = ['GNP']


@dataclass(eq=False)
class GNP(SharpnessAware):
    r"""Gradient-norm penalty: a mixture of the gradient at w and the gradient at the perturbed weights.

    .. math::

        e = \rho \, \frac{g}{\lVert g \rVert + \epsilon}, \qquad
        \tilde g = \nabla L(w + e), \qquad
        w \leftarrow \text{base}(w, (1 - \alpha) \, g + \alpha \, \tilde g)

    which is, to first order, the gradient of :math:`L(w) + \alpha \rho \lVert \nabla L(w) \rVert`. It equals coupled
    :class:`WSAM` with :math:`\gamma = \alpha / (1 + \alpha)`. With ``norm_perturbations`` g is divided by its norm in
    the mixture: :math:`(1 - \alpha) \, g / (\lVert g \rVert + \epsilon) + \alpha \, \tilde g`.

    Args:
        rho: radius of the perturbation, :math:`\rho > 0`, in the units of the weights' norm. May be set per group.
        alpha: weight of the perturbed gradient, :math:`\alpha \ge 0`; 0 is the base optimizer, 1 is SAM. May be set per
            group.
        norm_perturbations: divide g by its norm in the mixture, as the authors' program does by default.
        epsilon: added to the norms, :math:`\epsilon \ge 0`. May be set per group.

    Passes and memory:
        2 passes per perturbing step, two copies of the parameters at the peak, nothing between steps. Over ranks one
        collective for the first gradient, besides the second backward's own.

    Settings:
        The authors' program, WRN-28-10 on CIFAR-10: rho 0.1, alpha 0.8, ``norm_perturbations=True``, with SGD at
        learning rate 0.1, weight decay 0.001 and 200 epochs.

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> from composer_sam import GNP
        >>> algorithm = GNP(rho=0.05, alpha=0.7)   # Trainer(algorithms=[algorithm])

    Reference:
        Zhao, Zhang, Hu: Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning, ICML 2022,
        https://arxiv.org/abs/2202.03599
    """

    rho: Number = hyperparameter(0.05, gt=0)
    alpha: Number = hyperparameter(0.7, ge=0)
    norm_perturbations: bool = False
    epsilon: Number = hyperparameter(1e-12, ge=0)

    paper: ClassVar[str] = 'Zhao et al., ICML 2022, https://arxiv.org/abs/2202.03599'
    when: ClassVar[str] = 'you want to weigh flatness against loss yourself, with the mixture in the momentum'
    extra_copies: ClassVar[int] = 2

    def direction(self, step: Step) -> Passes:
        grad = yield Pass(sync=self.sync_first_pass)
        offset = step.offset(grad, self.rho, self.epsilon)
        mean_grad = self.averaged(step, grad)
        ascent_grad = yield Pass(at=offset.donate())
        if self.norm_perturbations:
            mean_grad = to_radius(mean_grad.donate(), 1.0, self.epsilon)
        plain = scale(mean_grad.donate(), complement(self.alpha))
        return Direction(axpy(self.alpha, ascent_grad, plain.donate()))

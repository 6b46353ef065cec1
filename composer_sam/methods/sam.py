"""Sharpness-aware minimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import hyperparameter
from composer_sam.vectors import Number

__all__ = ['SAM']


@dataclass(eq=False)
class SAM(SharpnessAware):
    r"""Sharpness-aware minimisation: the gradient at the worst weights nearby, to first order.

    .. math::

        e = \rho \, \frac{g}{\lVert g \rVert + \epsilon}, \qquad
        \tilde g = \nabla L(w + e), \qquad
        w \leftarrow \text{base}(w, \tilde g)

    with g the gradient of the batch at w; ``adaptive`` measures the radius in the scale of the weights,
    :math:`e = \rho \, w^2 g / (\lVert w g \rVert + \epsilon)`. The base optimizer applies weight decay, momentum and
    learning rate, once, at w.

    Args:
        rho: radius of the perturbation, :math:`\rho > 0`, in the units of the weights' L2 norm; 0.05 for a perturbation
            at every step, more for a larger ``interval`` (0.5 at interval 10). May be set per group; the norm is still
            taken over all parameters.
        epsilon: added to the norm, :math:`\epsilon \ge 0`. May be set per group.
        adaptive: measure the radius in the scale of all weights; :class:`ASAM` treats biases differently.

    Passes and memory:
        2 passes per perturbing step, one copy of the parameters at the peak, nothing between steps.

    Departures:
        The weights are restored bit for bit, where the authors' code and its ports compute (w + e) - e. A zero
        gradient leaves the weights unchanged for any epsilon.

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> from composer_sam import SAM
        >>> algorithm = SAM(rho=0.5, interval=10)   # Trainer(algorithms=[algorithm])

    Reference:
        Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving Generalization,
        ICLR 2021, https://arxiv.org/abs/2010.01412
    """

    rho: Number = hyperparameter(0.05, gt=0)
    epsilon: Number = hyperparameter(1e-12, ge=0)
    adaptive: bool = False

    paper: ClassVar[str] = 'Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412'

    def direction(self, step: Step) -> Passes:
        grad = yield Pass(sync=self.sync_first_pass)
        metric = step.weights() if self.adaptive else None
        ascent_grad = yield Pass(at=step.offset(grad.donate(), self.rho, self.epsilon, metric).donate())
        return Direction(ascent_grad)

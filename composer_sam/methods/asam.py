"""Adaptive sharpness-aware minimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import hyperparameter
from composer_sam.vectors import Number, Vector, absolute, join, ones_like, restrict

__all__ = ['ASAM']


@dataclass(eq=False)
class ASAM(SharpnessAware):
    r"""Adaptive SAM: the radius is measured in the scale of each weight.

    .. math::

        e = \rho \, \frac{T^2 g}{\lVert T g \rVert + \epsilon}, \qquad
        T = |w| + \eta \text{ for parameters called weight}, \; 1 \text{ for the others}, \qquad
        w \leftarrow \text{base}(w, \nabla L(w + e))

    This is not ``SAM(adaptive=True)``, which uses T = |w| for every parameter, biases included, and no eta.

    Args:
        rho: radius, :math:`\rho > 0`, relative to the weights' size; ten times SAM's is usual. May be set per group.
        eta: added to |w| where T uses it, :math:`\eta \ge 0`, in the weights' units.
        epsilon: added to the norm, :math:`\epsilon \ge 0`. May be set per group.

    Passes and memory:
        2 passes per perturbing step, one copy of the parameters at the peak, nothing
        between steps.

    Departures:
        The weights are restored bit for bit; the authors' code subtracts the offset.

    Settings:
        The authors' program: rho 0.5 on CIFAR-10 and 1.0 on CIFAR-100, eta 0.01. Ours: rho 2 on digits, 0.5 on a small
        CIFAR-10 (docs/choosing.md). For ``SAM(adaptive=True)`` ASAM's first author found 2.0 best on CIFAR-10.

    Raises:
        ValueError: a hyper-parameter is out of its range, or parameters have no names (no ``model``, or FSDP1 has
            flattened them).

    Example:
        >>> from composer_sam import ASAM
        >>> algorithm = ASAM(rho=0.5, eta=0.01)   # Trainer(algorithms=[algorithm])

    Reference:
        Kwon, Kim, Park, Choi: ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
        Networks, ICML 2021, https://arxiv.org/abs/2102.11600
    """

    rho: Number = hyperparameter(0.5, gt=0)
    eta: float = hyperparameter(0.01, ge=0, per_group=False)
    epsilon: Number = hyperparameter(1e-16, ge=0)

    paper: ClassVar[str] = 'Kwon et al., ICML 2021, https://arxiv.org/abs/2102.11600'
    when: ClassVar[str] = "layers' weights differ much in size, so that no radius fits all"
    first_pass_only_perturbs: ClassVar[bool] = True
    extra_copies: ClassVar[int] = 1

    def direction(self, step: Step) -> Passes:
        grad = yield Pass(sync=self.sync_first_pass, fraction=self.ascent_fraction)
        ascent_grad = yield Pass(at=step.offset(grad.donate(), self.rho, self.epsilon, self._metric(step)).donate())
        return Direction(ascent_grad)

    def _metric(self, step: Step) -> Vector:
        is_weight = ['weight' in name for name in step.names('ASAM')]
        weights = [place for place, it_is in enumerate(is_weight) if it_is]
        others = [place for place, it_is in enumerate(is_weight) if not it_is]
        w = step.weights()
        return join(absolute(restrict(w, weights), plus=self.eta), ones_like(restrict(w, others)))

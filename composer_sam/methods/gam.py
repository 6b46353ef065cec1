"""Gradient-norm aware minimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import hyperparameter
from composer_sam.vectors import Number, Vector, add, axpy, each, reject, scale, subtract

__all__ = ['GAM']


@dataclass(eq=False)
class GAM(SharpnessAware):
    r"""Gradient-norm aware minimisation: seeks minima around which the gradient stays small (first-order flatness).

    Four gradients are taken at absolute offsets from w: :math:`g_0` at w and

    .. math::

        e_0 &= \rho \, g_0 / (\lVert g_0 \rVert + \epsilon), & g_1 &\text{ at } w + e_0 \\
        e_1 &= \rho_n \, h / (\lVert h \rVert + \epsilon), \quad h = g_1 - g_0, & g_2 &\text{ at } w + e_1 \\
        e_2 &= \rho \, g_2 / (\lVert g_2 \rVert + \epsilon), & g_3 &\text{ at } w + e_1 + e_2

    They are decomposed, with :math:`p = g_0 + |\beta_2| g_2` and :math:`q = \beta_1 g_1 + \beta_3 g_3`:

    .. math::

        d = q - \gamma \left( p - \cos(p, q) \lVert p \rVert \frac{q}{\lVert q \rVert + \epsilon} \right), \qquad
        w \leftarrow \text{base}(w, d)

    The part of p that is orthogonal to q is subtracted, so the step does not descend along it.

    Args:
        grad_rho: :math:`\rho`, the radius of the gradient ascent steps, > 0. May be set per group.
        grad_norm_rho: :math:`\rho_n`, the radius of the step up the gradient norm, > 0. May be set per group.
        grad_beta_1: :math:`\beta_1`, weight of :math:`g_1`. The published settings have two numbers, ``beta_0`` and
            ``beta_1``: this is ``beta_1``, ``grad_beta_2 = 1 - beta_0`` and ``grad_beta_3 = 1 - beta_1``.
        grad_beta_2: :math:`\beta_2`, weight of :math:`g_2`.
        grad_beta_3: :math:`\beta_3`, weight of :math:`g_3`.
        grad_gamma: :math:`\gamma`, strength of the decomposition, >= 0.
        epsilon: added to every norm in a denominator, >= 0.
        adaptive: measure every radius in the scale of the weights where its step starts: w for :math:`e_0` and
            :math:`e_1`, :math:`w + e_1` for :math:`e_2`.

    All four passes are unsynchronised over ranks, and the direction is averaged once; ``sync_first_pass=True``
    synchronises all four instead.

    Passes and memory:
        4 passes per perturbing step, three copies of the parameters at the peak, nothing between steps.

    Departures:
        The authors' code keeps six tensors of the parameters' size between steps and restores the weights by
        subtraction; here offsets are absolute and the weights are restored bit for bit.

    Settings:
        The authors' program has settings for ResNets and PyramidNets: the recipes gam_resnet.yaml and
        gam_pyramidnet.yaml in yamls/cifar10 and yamls/cifar100. Ours: grad_rho 0.1 and grad_norm_rho 1 on digits, 0.05
        and 0.5 on a small CIFAR-10 (docs/choosing.md).

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> from composer_sam import GAM
        >>> algorithm = GAM(grad_rho=0.02, grad_norm_rho=0.2)   # Trainer(algorithms=[algorithm])

    Reference:
        Zhang, Xu, Yu, Zou, Cui: Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves
        Generalization, CVPR 2023, https://arxiv.org/abs/2303.03108
    """

    grad_rho: Number = hyperparameter(0.02, gt=0)
    grad_norm_rho: Number = hyperparameter(0.2, gt=0)
    grad_beta_1: Number = hyperparameter(0.5)
    grad_beta_2: Number = hyperparameter(0.5)
    grad_beta_3: Number = hyperparameter(0.5)
    grad_gamma: Number = hyperparameter(0.03, ge=0)
    epsilon: float = hyperparameter(1e-12, ge=0, per_group=False)
    adaptive: bool = False

    paper: ClassVar[str] = 'Zhang et al., CVPR 2023, https://arxiv.org/abs/2303.03108'
    when: ClassVar[str] = 'SAM helps, and four passes are affordable'
    extra_copies: ClassVar[int] = 3

    def direction(self, step: Step) -> Passes:
        sync = self.sync_first_pass

        def offset(x: Vector, rho: Number, start: Vector | None = None) -> Vector:
            return step.offset(x, rho, self.epsilon, step.weights(start) if self.adaptive else None)

        g0 = yield Pass(sync=sync)
        g1 = yield Pass(at=offset(g0, self.grad_rho).donate(), sync=sync)

        def up_the_norm() -> Vector:
            return offset(subtract(g1, g0).donate(), self.grad_norm_rho)

        g2 = yield Pass(at=up_the_norm().donate(), sync=sync)
        e1 = up_the_norm()  # computed again instead of kept in memory during a pass
        p = axpy(each(_magnitude, self.grad_beta_2), g2, g0.donate())
        e2 = offset(g2.donate(), self.grad_rho, start=e1)
        g3 = yield Pass(at=add(e1.donate(), e2.donate()).donate(), sync=sync)
        q = axpy(self.grad_beta_3, g3, scale(g1.donate(), self.grad_beta_1).donate())
        del g3
        orthogonal = reject(p.donate(), q, self.epsilon)
        direction = subtract(q.donate(), scale(orthogonal.donate(), self.grad_gamma))
        return Direction(direction if sync else step.mean(direction))


def _magnitude(beta: float) -> float:
    return abs(beta)

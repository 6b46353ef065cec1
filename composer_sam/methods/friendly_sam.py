"""Friendly sharpness-aware minimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import hyperparameter
from composer_sam.vectors import Number, axpy, complement, negative, scale

__all__ = ['FriendlySAM']


@dataclass(eq=False)
class FriendlySAM(SharpnessAware):
    r"""Friendly SAM: perturbs along what is particular to the batch, without the part that all batches share.

    With m a moving average of the gradients, an estimate of the gradient of all data,

    .. math::

        u = g - \sigma m, \qquad
        e = \rho \, \frac{u}{\lVert u \rVert + \epsilon}, \qquad
        w \leftarrow \text{base}(w, \nabla L(w + e)), \qquad
        m \leftarrow \lambda m + (1 - \lambda) \, g

    u uses m as it was before the step. In the method's first step u = g and m = g.

    Args:
        rho: radius of the perturbation, :math:`\rho > 0`, in the units of the weights' norm. May be set per group.
        sigma: how much of the average is taken away, :math:`\sigma \ge 0`; 0 is SAM. May be set per group.
        lmbda: :math:`\lambda`, how slowly the average moves, :math:`0 \le \lambda < 1`. May be set per group.
        adaptive: measure the radius in the scale of the weights, :math:`e = \rho w^2 u / (\lVert w u \rVert +
            \epsilon)`.
        epsilon: added to the norm, :math:`\epsilon \ge 0`. May be set per group.

    Passes and memory:
        2 passes per perturbing step, three copies of the parameters at the peak; one copy, m, between steps, in
        checkpoints too. Each rank perturbs by its own g, m is the average over ranks, by one collective besides the
        second backward's own.

    Departures:
        A popular copy averages u in place of g; the authors' program, and this, average g.

    Settings:
        The authors' programs: lmbda 0.6 in the script, 0.95 in train.py; sigma 1.

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> from composer_sam import FriendlySAM
        >>> algorithm = FriendlySAM(rho=0.05, lmbda=0.95)   # Trainer(algorithms=[algorithm])

    Reference:
        Li, Zhou, He, Cheng, Huang: Friendly Sharpness-Aware Minimization, CVPR 2024, https://arxiv.org/abs/2403.12350
    """

    rho: Number = hyperparameter(0.05, gt=0)
    sigma: Number = hyperparameter(1.0, ge=0)
    lmbda: Number = hyperparameter(0.9, ge=0, lt=1)
    adaptive: bool = False
    epsilon: Number = hyperparameter(1e-12, ge=0)

    paper: ClassVar[str] = 'Li et al., CVPR 2024, https://arxiv.org/abs/2403.12350'
    when: ClassVar[str] = 'SAM helps, and memory for one more copy of the weights is affordable'
    first_pass_only_perturbs: ClassVar[bool] = True
    extra_copies: ClassVar[int] = 3
    held_copies: ClassVar[int] = 1

    def direction(self, step: Step) -> Passes:
        grad = yield Pass(sync=self.sync_first_pass, fraction=self.ascent_fraction)
        mean_grad = grad if self.sync_first_pass else step.mean(grad)
        average = step.memory.get('average')
        if average is None:
            particular = grad
            step.staged['average'] = mean_grad
        else:
            particular = axpy(negative(self.sigma), average, grad).donate()
            moved = scale(mean_grad, complement(self.lmbda))
            step.staged['average'] = axpy(self.lmbda, average, moved.donate())
        offset = step.offset(particular, self.rho, self.epsilon, step.weights() if self.adaptive else None)
        del grad, mean_grad, particular
        ascent_grad = yield Pass(at=offset.donate())
        return Direction(ascent_grad)

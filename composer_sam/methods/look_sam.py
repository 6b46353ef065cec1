"""LookSAM: the second pass at every k-th step only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import check_count, choice, hyperparameter
from composer_sam.vectors import Number, axpy, orthogonal, rescale

__all__ = ['LookSAM']


@dataclass(eq=False)
class LookSAM(SharpnessAware):
    r"""LookSAM: SAM at every k-th step; the steps between reuse the part of SAM's gradient that changes slowly.

    At the method's steps 1, k + 1, 2k + 1, ..., with g the gradient at w and :math:`\tilde g` the gradient at
    :math:`w + \rho g / (\lVert g \rVert + \epsilon)`,

    .. math::

        d = \tilde g, \qquad m = \tilde g - \frac{\langle \tilde g, g \rangle}{\lVert g \rVert^2 + \epsilon} \, g

    and at the others

    .. math::

        d = g + \alpha \, \lVert g \rVert \, \frac{m}{\lVert m \rVert + \epsilon}

    Args:
        rho: radius of the perturbation, :math:`\rho > 0`, in the units of the weights' norm. May be set per group.
        k: SAM at every k-th step; an integer >= 1, 1 is SAM.
        alpha: weight of the reused part, :math:`\alpha \ge 0`. May be set per group.
        granularity: what norms and inner products are taken over: ``'global'``, as the paper says, or ``'tensor'``,
            every parameter's tensor by itself, as the most used re-implementation does.
        epsilon: added to the norms, :math:`\epsilon \ge 0`.

    Passes and memory:
        2 passes at every k-th step and 1 at the others; three copies of the parameters at the peak; one copy, m,
        between steps, in checkpoints too. Over ranks SAM's steps take one collective for the first gradient, besides
        the second backward's own.

    Departures:
        Popular copies take the weights for the old gradient, or add the gradient twice at the steps between; the
        paper's rule is here.

    Settings:
        No published settings beyond the defaults. Ours with k 5 and 10 kept less of SAM's gain than ``interval`` does
        (benchmarks/results/thrift.md).

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Limits:
        - Our runs: worse than SGD on three tasks of five (docs/choosing.md).

    Example:
        >>> from composer_sam import LookSAM
        >>> algorithm = LookSAM(rho=0.05, k=5)   # Trainer(algorithms=[algorithm])

    Reference:
        Liu, Mai, Chen, Hsieh, You: Towards Efficient and Scalable Sharpness-Aware Minimization, CVPR 2022,
        https://arxiv.org/abs/2203.02714
    """

    rho: Number = hyperparameter(0.05, gt=0)
    k: int = 5
    alpha: Number = hyperparameter(0.7, ge=0)
    granularity: str = choice('global', 'tensor')
    epsilon: float = hyperparameter(1e-12, ge=0, per_group=False)

    paper: ClassVar[str] = 'Liu et al., CVPR 2022, https://arxiv.org/abs/2203.02714'
    when: ClassVar[str] = 'SAM helps, and its price at every step is too dear'
    extra_copies: ClassVar[int] = 3
    held_copies: ClassVar[int] = 1
    varies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count('k', self.k)

    def direction(self, step: Step) -> Passes:
        reused = step.memory.get('reused')
        if reused is not None and (step.number // self.interval) % self.k:
            grad = yield Pass()
            step.staged['reused'] = reused
            along = rescale(reused, grad, self.granularity, self.epsilon)
            return Direction(axpy(self.alpha, along, grad.donate()))
        grad = yield Pass(sync=self.sync_first_pass)
        offset = step.offset(grad, self.rho, self.epsilon)
        mean_grad = self.averaged(step, grad)
        ascent_grad = yield Pass(at=offset.donate())
        step.staged['reused'] = orthogonal(ascent_grad, mean_grad.donate(), self.epsilon, self.granularity)
        return Direction(ascent_grad)

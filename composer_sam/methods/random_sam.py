"""SAM at random steps."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import check_count, hyperparameter
from composer_sam.vectors import Number

__all__ = ['RandomSAM']


@dataclass(eq=False)
class RandomSAM(SharpnessAware):
    r"""SAM at random steps: with probability p a step is SAM's, otherwise the base optimizer's.

    .. math::

        d = \begin{cases} \nabla L(w + \rho \, g / (\lVert g \rVert + \epsilon)) & u_t < p \\ g & \text{otherwise}
        \end{cases}, \qquad w \leftarrow \text{base}(w, d)

    with :math:`u_t` uniform in [0, 1), a function of the seed and the number of the step alone: the same on all ranks,
    for every run with the seed, and after a resume. The global random streams are not read.

    Args:
        rho: radius of the perturbation, :math:`\rho > 0`, in the units of the weights' norm. May be set per group.
        p: probability of a SAM step, :math:`0 < p \le 1`; 1 is SAM.
        seed: seed of the choice of steps, an integer >= 0.
        epsilon: added to the norm, :math:`\epsilon \ge 0`. May be set per group.

    Passes and memory:
        2 passes at SAM's steps and 1 at the others, 1 + p on average; one copy of the parameters at the peak, nothing
        between steps.

    Settings:
        No published settings beyond the defaults. Ours kept more of SAM's gain with p 0.5 than with 0.2, on four tasks
        of five (benchmarks/results/thrift.md).

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> from composer_sam import RandomSAM
        >>> algorithm = RandomSAM(rho=0.05, p=0.5)   # Trainer(algorithms=[algorithm])

    Reference:
        Zhao, Zhang, Hu: Randomized Sharpness-Aware Training for Boosting Computational Efficiency in Deep Learning,
        2022, https://arxiv.org/abs/2203.09962. Not to be taken for the Random SAM (R-SAM) of Liu et al., NeurIPS 2022,
        which adds noise to the weights.
    """

    rho: Number = hyperparameter(0.05, gt=0)
    p: float = hyperparameter(0.5, gt=0, le=1, per_group=False)
    seed: int = 0
    epsilon: Number = hyperparameter(1e-12, ge=0)

    paper: ClassVar[str] = 'Zhao et al., 2022, https://arxiv.org/abs/2203.09962'
    when: ClassVar[str] = 'you want SAM at a part of its price; interval=k is the same on a fixed beat'
    first_pass_only_perturbs: ClassVar[bool] = True
    varies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count('seed', self.seed, least=0)

    def direction(self, step: Step) -> Passes:
        if random.Random(f'{self.seed} {step.number}').random() >= self.p:
            return Direction((yield Pass()))
        grad = yield Pass(sync=self.sync_first_pass, fraction=self.ascent_fraction)
        ascent_grad = yield Pass(at=step.offset(grad.donate(), self.rho, self.epsilon).donate())
        return Direction(ascent_grad)

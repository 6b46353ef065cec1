"""Sharpness-aware gradient matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import hyperparameter
from composer_sam.vectors import Number, add, scale, subtract

__all__ = ['SAGM']


@dataclass(eq=False)
class SAGM(SharpnessAware):
    r"""Sharpness-aware gradient matching: made for test data from other domains than the training data.

    .. math::

        e = \left( \frac{\rho}{\lVert g \rVert + \epsilon} - \alpha \right) g, \qquad
        \tilde g = \nabla L(w + e), \qquad
        w \leftarrow \text{base}\left( w, \tfrac{1}{2} (g + \tilde g) \right)

    The step back by :math:`\alpha g` makes the gradients of the loss and of the perturbed loss agree.

    Args:
        rho: radius of the perturbation, :math:`\rho > 0`, in the units of the weights' norm. May be set per group.
        alpha: the step back, :math:`\alpha \ge 0`, in the units of a learning rate. May be set per group.
        epsilon: added to the norm, :math:`\epsilon \ge 0`. May be set per group.

    Passes and memory:
        2 passes per perturbing step, two copies of the parameters at the peak, nothing between steps. Over ranks both
        passes are unsynchronised, and the direction is averaged once; ``sync_first_pass=True`` synchronises both.

    Settings:
        The authors' program (DomainBed, learning rate 1e-5 to 3e-5): alpha 0.001 on PACS, VLCS and TerraIncognita,
        0.0005 on OfficeHome and DomainNet.

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> from composer_sam import SAGM
        >>> algorithm = SAGM(rho=0.05, alpha=0.001)   # Trainer(algorithms=[algorithm])

    Reference:
        Wang, Zhang, Lei, Zhang: Sharpness-Aware Gradient Matching for Domain Generalization, CVPR 2023,
        https://arxiv.org/abs/2303.10353
    """

    rho: Number = hyperparameter(0.05, gt=0)
    alpha: Number = hyperparameter(0.001, ge=0)
    epsilon: Number = hyperparameter(1e-12, ge=0)

    paper: ClassVar[str] = 'Wang et al., CVPR 2023, https://arxiv.org/abs/2303.10353'
    when: ClassVar[str] = 'the test data are of other domains than the training data'
    extra_copies: ClassVar[int] = 2

    def direction(self, step: Step) -> Passes:
        sync = self.sync_first_pass
        grad = yield Pass(sync=sync)
        back = scale(step.perturbed(grad), self.alpha)
        offset = subtract(step.offset(grad, self.rho, self.epsilon).donate(), back)
        del back
        ascent_grad = yield Pass(at=offset.donate(), sync=sync)
        direction = scale(add(ascent_grad.donate(), grad).donate(), 0.5)
        return Direction(direction if sync else step.mean(direction.donate()))

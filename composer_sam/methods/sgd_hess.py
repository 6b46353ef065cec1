"""SGD weighted by curvature: the study's control without a perturbation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from composer_sam.engine.moment import Moment
from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import check_count, hyperparameter
from composer_sam.vectors import Number, absolute, add, multiply, rademacher, scale, spatial_mean

__all__ = ['SGDHess']


@dataclass(eq=False)
class SGDHess(SharpnessAware):
    r"""The gradient scaled up by curvature: SAM's first-order effect on the magnitude, without a perturbation.

    .. math::

        h = |H v|, \qquad d = g + \rho \, h \odot g, \qquad w \leftarrow \text{base}(w, d)

    with H the Hessian of the batch's loss and v one vector of random signs per step (Hutchinson), the same on every
    rank. H v is averaged over ranks before the absolute value is taken, and h over the spatial elements of convolution
    kernels.

    Args:
        rho: strength, :math:`\rho > 0`; 0.05 to 2 in the study. May be set per group.
        interval_hessian: compute h once every so many steps and keep it in between, an integer >= 1.

    Passes and memory:
        1 pass per perturbing step, whose backward keeps its graph to be differentiated again: about the time of two
        more passes and the memory of the graph. At the peak four copies of the parameters besides the graph. Between
        steps nothing, or h (one copy, in checkpoints too) where ``interval_hessian`` > 1.

    The backward must be differentiable. Under a Trainer it is (``backwards_create_graph``); in a loop of your own, call
    ``loss.backward(create_graph=True)``. v comes from a separate random stream, seeded by the step's number.

    Settings:
        The study: rho 0.05, 1 and 2 with ResNet-18 on CIFAR-100, 200 epochs; its recipes are in yamls/study. Ours: rho
        1 on digits (docs/choosing.md).

    Raises:
        ValueError: a hyper-parameter is out of its range; or at the first step, which leaves the weights unchanged, the
            gradient has no graph, the model cannot be differentiated twice, or FSDP shards the parameters.

    Limits:
        - Kernels without a second derivative, reentrant activation checkpoints and fp16 scaling are refused.
        - torch's own second derivatives of ``weight_norm`` (but for ``dim=None``) are wrong in 2.6 to 2.15, and so is
          h.
        - ``device_train_microbatch_size='auto'`` under DistributedDataParallel: Composer synchronises every pass of the
          very first batch.

    Example:
        >>> from composer_sam import SGDHess
        >>> algorithm = SGDHess(rho=0.05)   # Trainer(algorithms=[algorithm])

    Reference:
        Luong: an empirical study of the direction and the magnitude of SAM's gradient, 2024; the estimator of h is
        Yao et al., AdaHessian, AAAI 2021, https://arxiv.org/abs/2006.00719
    """

    rho: Number = hyperparameter(0.05, gt=0)
    interval_hessian: int = 1

    paper: ClassVar[str] = 'Luong, 2024, after Yao et al., https://arxiv.org/abs/2006.00719'
    when: ClassVar[str] = 'you study curvature without a perturbation'
    for_studies: ClassVar[bool] = True
    extra_copies: ClassVar[int] = 4
    # DistributedDataParallel cannot average a gradient with a graph, so this method averages on every step.
    takes_every_step: ClassVar[bool] = True
    _excluded = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count('interval_hessian', self.interval_hessian)
        self.refuse_sync_first_pass('it averages g and Hv over ranks itself')
        if self.multipliers is not None:
            raise ValueError('multipliers mean nothing to SGDHess, which does not perturb the weights')

    @property
    def backwards_create_graph(self) -> bool:
        return True

    def resolved(self, moment: Moment, groups: Sequence[tuple[dict[str, Any], int]]) -> SharpnessAware:
        method = copy.copy(super().resolved(moment, groups))
        assert isinstance(method, SGDHess)
        method._excluded = not self.perturbs(moment)
        return method

    def direction(self, step: Step) -> Passes:
        if self._excluded:
            grad = yield Pass(sync=False)
            return Direction(step.mean(grad))
        if 'curvature' in step.memory and step.number % self.interval_hessian:
            grad = yield Pass(sync=False)
            grad, curvature = step.mean(grad), step.memory['curvature']
        else:
            grad = yield Pass(sync=False, graph=True)
            grad, product = step.hessian_product(grad, rademacher(step.layout, seed=step.number))
            grad, product = step.mean(grad), step.mean(product)
            curvature = spatial_mean(absolute(step.selected(product)))
        if self.interval_hessian > 1:
            step.staged['curvature'] = curvature
        return Direction(add(scale(multiply(curvature, grad), self.rho), grad))

"""Weighted sharpness-aware minimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import hyperparameter
from composer_sam.vectors import Number, axpy, clip, complement, each, scale, subtract

__all__ = ['WSAM']


@dataclass(eq=False)
class WSAM(SharpnessAware):
    r"""Weighted SAM: sharpness is a regulariser with its own weight, optionally decoupled from the base optimizer.

    .. math::

        e = \rho \, \frac{g}{\lVert g \rVert + \epsilon}, \qquad
        \tilde g = \nabla L(w + e), \qquad
        \alpha = \frac{\gamma}{1 - \gamma}

    With G and :math:`\tilde G` the averages of g and :math:`\tilde g` over ranks, clipped to ``max_norm`` if given:

    .. math::

        \text{decoupled: } \quad w \leftarrow \text{base}(w, G) - \text{lr} \, \alpha \, (\tilde G - G), \qquad
        \text{coupled: } \quad w \leftarrow \text{base}(w, (1 - \alpha) G + \alpha \tilde G)

    e uses the unclipped gradient. Coupled with ``gamma=0.5`` this is SAM; ``gamma=0`` is the base optimizer at twice
    the cost.

    Args:
        rho: radius of the perturbation, :math:`\rho > 0`, in the units of the weights' norm. May be set per group.
        gamma: weight of the sharpness, :math:`0 \le \gamma < 1`. May be set per group.
        epsilon: added to the norm, :math:`\epsilon \ge 0`. May be set per group.
        adaptive: measure the radius in the scale of the weights, :math:`e = \rho w^2 g / (\lVert w g \rVert +
            \epsilon)`.
        decouple: apply the sharpness term after the base optimizer's step, without momentum or preconditioner.
        max_norm: clip both averaged gradients to this norm, > 0, as ``torch.nn.utils.clip_grad_norm_`` does.

    Passes and memory:
        2 passes per perturbing step, two copies of the parameters at the peak, nothing between steps. Over ranks one
        collective for the first gradient, besides the second backward's own.

    Departures:
        The authors' code keeps the gradient of an earlier ``backward`` and adds to it, which doubles the first
        gradient; here the passes are independent. The weights are restored bit for bit.

    Settings:
        The authors' program: rho 0.05, gamma 0.88, ``decouple=True``, ``max_norm=1.0``. Ours, with gamma 0.9: rho 0.2
        to 0.5 on digits, 0.05 on a small CIFAR-10 (docs/choosing.md).

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> from composer_sam import WSAM
        >>> algorithm = WSAM(rho=0.05, gamma=0.9)   # Trainer(algorithms=[algorithm])

    Reference:
        Yue, Jiang, Ye, Gao, Liu, Zhang: Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization
        Term, KDD 2023, https://arxiv.org/abs/2305.15817
    """

    rho: Number = hyperparameter(0.05, gt=0)
    gamma: Number = hyperparameter(0.9, ge=0, lt=1)
    epsilon: Number = hyperparameter(1e-12, ge=0)
    adaptive: bool = False
    decouple: bool = True
    max_norm: float | None = hyperparameter(None, gt=0, per_group=False)

    paper: ClassVar[str] = 'Yue et al., KDD 2023, https://arxiv.org/abs/2305.15817'
    when: ClassVar[str] = 'you want to weigh flatness against loss yourself, apart from momentum and preconditioner'
    extra_copies: ClassVar[int] = 2

    def direction(self, step: Step) -> Passes:
        grad = yield Pass(sync=self.sync_first_pass)
        offset = step.offset(grad, self.rho, self.epsilon, step.weights() if self.adaptive else None)
        mean_grad = self.averaged(step, grad)
        ascent_grad = yield Pass(at=offset.donate())
        if self.max_norm is not None:
            mean_grad = clip(mean_grad.donate(), self.max_norm)
            ascent_grad = clip(ascent_grad.donate(), self.max_norm)
        alpha = each(_odds, self.gamma)
        if self.decouple:
            sharpness = subtract(ascent_grad.donate(), mean_grad)
            return Direction(mean_grad, decoupled=scale(sharpness.donate(), alpha))
        plain = scale(mean_grad.donate(), complement(alpha))
        return Direction(axpy(alpha, ascent_grad, plain.donate()))


def _odds(gamma: float) -> float:
    return gamma / (1 - gamma)

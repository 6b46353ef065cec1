"""SAM's direction at SGD's magnitude: one of the two things that SAM changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import choice, hyperparameter
from composer_sam.vectors import Number, rescale

__all__ = ['SAMDirection']


@dataclass(eq=False)
class SAMDirection(SharpnessAware):
    r"""SAM's direction at SGD's magnitude, to test which of the two makes SAM better than SGD.

    With g the gradient at w, :math:`\tilde g` the gradient at :math:`w + \rho g / (\lVert g \rVert + \epsilon)`, both
    averaged over ranks for the direction,

    .. math::

        d = \tilde g \, \frac{\lVert g \rVert}{\lVert \tilde g \rVert}, \qquad
        w \leftarrow \text{base}(w, d)

    for ``granularity='global'``; the same for each parameter's tensor separately for ``'tensor'``; and
    :math:`d = \operatorname{sign}(\tilde g) |g|` for ``'elementwise'``. Where the norm in a denominator is zero, d is
    zero.

    The study (Luong, 2024) defines the direction of a gradient as g / ||g|| and its magnitude as ||g||, and this class
    uses these definitions. The program that produced the study's tables works elementwise and swaps the two names: its
    ``SAMMAGNITUDE`` is ``SAMDirection(granularity='elementwise')``.

    Args:
        rho: radius of the perturbation, :math:`\rho > 0`, in the units of the weights' norm. May be set per group.
        granularity: what a magnitude is taken over: ``'global'``, ``'tensor'`` or ``'elementwise'``.
        adaptive: measure the radius in the scale of the weights, :math:`e = \rho w^2 g / (\lVert w g \rVert +
            \epsilon)`.
        epsilon: added to the norm, :math:`\epsilon \ge 0`. May be set per group.

    Passes and memory:
        2 passes per perturbing step, two copies of the parameters at the peak, nothing between steps. Over ranks one
        collective for the first gradient, besides the second backward's own.

    Settings:
        The study: rho 0.1, 0.2 and 0.4 with ResNet-18 on CIFAR-100, 200 epochs; its recipes are in yamls/study. Ours:
        rho 0.5 on digits (docs/choosing.md).

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> from composer_sam import SAMDirection
        >>> algorithm = SAMDirection(rho=0.1, granularity='tensor')   # Trainer(algorithms=[algorithm])

    Reference:
        Luong: an empirical study of the direction and the magnitude of SAM's gradient, 2024, on
        Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412
    """

    rho: Number = hyperparameter(0.05, gt=0)
    granularity: str = choice('global', 'tensor', 'elementwise')
    adaptive: bool = False
    epsilon: Number = hyperparameter(1e-12, ge=0)

    paper: ClassVar[str] = 'Luong, 2024, after Foret et al., https://arxiv.org/abs/2010.01412'
    when: ClassVar[str] = "you study SAM's direction without its magnitude"
    for_studies: ClassVar[bool] = True
    extra_copies: ClassVar[int] = 2

    def direction(self, step: Step) -> Passes:
        grad = yield Pass(sync=self.sync_first_pass)
        offset = step.offset(grad, self.rho, self.epsilon, step.weights() if self.adaptive else None)
        mean_grad = self.averaged(step, grad)
        ascent_grad = yield Pass(at=offset.donate())
        return Direction(rescale(ascent_grad, mean_grad, self.granularity))

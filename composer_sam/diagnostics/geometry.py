"""The angle and the lengths of a method's direction and the plain gradient."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from composer_sam.vectors import Vector, dot, norm, share

__all__ = ['GradientGeometry', 'gradient_geometry']


@dataclass(frozen=True)
class GradientGeometry:
    """The numbers of :func:`gradient_geometry`, each a 0-dimensional tensor."""

    gradient_norm: Tensor
    direction_norm: Tensor
    cosine: Tensor
    share_larger: Tensor
    share_opposite: Tensor

    def as_dict(self) -> dict[str, float]:
        """Return all numbers by name; this synchronises with the device once."""
        names = [field.name for field in dataclasses.fields(self)]
        values = torch.stack([getattr(self, name).double() for name in names]).tolist()
        return dict(zip(names, values, strict=True))


def gradient_geometry(gradient: Vector, direction: Vector) -> GradientGeometry:
    r"""Compare the direction that a method hands to the base optimizer with the plain gradient.

    :math:`g` is the plain gradient at the weights and :math:`d` the direction, for SAM the gradient at the perturbed
    weights. Over all :math:`n` entries of the parameters with a gradient, on all ranks, the result holds

    .. math::
        \lVert g \rVert, \quad \lVert d \rVert, \quad
        \cos = \frac{\langle g, d \rangle}{\lVert g \rVert \lVert d \rVert}, \quad
        \text{larger} = \frac{1}{n} \#\{i : |d_i| > |g_i|\}, \quad
        \text{opposite} = \frac{1}{n} \#\{i : g_i d_i < 0\}

    in this order as ``gradient_norm``, ``direction_norm``, ``cosine``, ``share_larger`` and ``share_opposite``. The
    last two are the third experiment of Luong's study. The cosine with a zero vector is 0. For a decoupled method
    (WSAM) :math:`d` includes the part that is applied after the base optimizer.

    Args:
        gradient: :math:`g`, averaged over ranks.
        direction: :math:`d`, averaged over ranks.

    Cost:
        A few reads of both vectors; for sharded parameters one collective for each sum.

    Example:
        >>> import torch
        >>> from composer_sam import SAM, SharpnessAwareOptimizer
        >>> from composer_sam.diagnostics import gradient_geometry
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SAM(), model)
        >>> optimizer.observer = lambda gradient, direction: print(gradient_geometry(gradient, direction).cosine)

    Reference:
        Luong, An Empirical Study on Sharpness-Aware Minimization, 2024; Foret et al., ICLR 2021,
        https://arxiv.org/abs/2010.01412
    """
    g, d = norm(gradient), norm(direction)
    lengths = g * d
    cosine = torch.where(lengths == 0, torch.zeros_like(lengths), dot(gradient, direction) / lengths)
    larger = share(lambda x, y: y.abs() > x.abs(), gradient, direction)
    # The product of the signs: a product of small numbers would underflow.
    opposite = share(lambda x, y: x.sign() * y.sign() < 0, gradient, direction)
    return GradientGeometry(g, d, cosine, larger, opposite)

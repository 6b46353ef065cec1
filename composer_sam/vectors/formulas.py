"""The formulas of the papers on weight-space vectors, out of the operations of ``algebra.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from composer_sam.vectors.algebra import (
    absolute,
    aligned,
    axpy,
    dots,
    each,
    half_precision,
    inner_products,
    multiply,
    norm,
    norms,
    quotient,
    scale,
    sign,
)
from composer_sam.vectors.layout import Layout
from composer_sam.vectors.vector import Number, PerParameter, Vector

__all__ = [
    'clip',
    'orthogonal',
    'rademacher',
    'reject',
    'rescale',
    'shorten',
    'spatial_mean',
    'to_radius',
]


def to_radius(
    x: Vector,
    rho: Number,
    epsilon: Number = 1e-12,
    metric: Vector | None = None,
    length: Tensor | None = None,
) -> Vector:
    r"""Return the vector along ``x`` of length ``rho``: the ascent step of the first-order methods.

    .. math:: e = \rho \, \frac{T^2 x}{\lVert T x \rVert + \epsilon}

    with the elementwise ``metric`` T, by default 1; a sign in T has no effect. The zero vector stays zero, also for
    ``epsilon=0``. If groups set their own ``rho``, the norm is still taken over all parameters. In place if ``x`` is
    donated. ``length`` is the norm of T x, if it is known.
    """
    if metric is not None:
        x = multiply(x, metric).donate()  # nothing else uses the product
    of = norm(x) if length is None else length
    if metric is not None:
        x = multiply(x, metric).donate()

    # Read from CPU memory the norm needs no wait, and a multiple with a pending factor no memory.
    size = of.item() if of.is_cpu and not half_precision(x) else None

    def factor(radius: float, eps: float) -> float | Tensor:
        if size is not None:
            return radius / (size + eps) if size else 0.0
        return torch.where(of == 0, torch.zeros_like(of), radius / (of + eps))

    found = each(factor, rho, epsilon)
    return x.times(found) if isinstance(found, float) else scale(x, found)


def shorten(x: Vector, rho: Number) -> Vector:
    r"""Return ``x`` scaled down to length ``rho`` if it is longer: its projection onto the ball.

    .. math:: x \, \min\left(1, \frac{\rho}{\lVert x \rVert}\right)
    """
    length = norm(x)

    def factor(radius: float) -> Tensor:
        return torch.where(length > radius, radius / length, torch.ones_like(length))

    return scale(x, each(factor, rho))


def clip(x: Vector, max_norm: float) -> Vector:
    r"""Return ``x`` scaled down to ``max_norm`` if it is longer, as :func:`torch.nn.utils.clip_grad_norm_` does.

    .. math:: x \, \min\left(1, \frac{\text{max\_norm}}{\lVert x \rVert + 10^{-6}}\right)
    """
    return scale(x, torch.clamp(max_norm / (norm(x) + 1e-6), max=1.0))


def reject(x: Vector, y: Vector, epsilon: float = 0.0) -> Vector:
    r"""Return the part of ``x`` orthogonal to ``y``.

    .. math:: x - \cos(x, y) \, \lVert x \rVert \, \frac{y}{\lVert y \rVert + \epsilon}, \qquad
        \cos(x, y) = \frac{\langle x, y \rangle}{\lVert x \rVert \lVert y \rVert + \epsilon}
    """
    xx, xy, yy = dots((x, x), (x, y), (y, y))
    x_norm, y_norm = xx.sqrt(), yy.sqrt()
    cosine = quotient(xy, x_norm * y_norm + epsilon)
    return axpy(quotient(cosine * x_norm, y_norm + epsilon).neg(), y, x)


def orthogonal(x: Vector, y: Vector, epsilon: float = 0.0, granularity: str = 'global') -> Vector:
    r"""Return ``x`` without its part along ``y``, over all parameters or, for ``'tensor'``, in each parameter's tensor.

    .. math:: x - \frac{\langle x, y \rangle}{\lVert y \rVert^2 + \epsilon} \, y

    A donated ``y`` is scaled in place where its factor is not one number.
    """
    if granularity == 'global':
        xy, yy = dots((x, y), (y, y))
        return axpy(quotient(xy, yy + epsilon).neg(), y, x)
    x, y = aligned(x, y)
    along, squares = inner_products(x, y), inner_products(y, y)
    factors = _per_tensor(lambda xy, yy: quotient(xy, yy + epsilon).neg(), (x, along), (y, squares))
    return axpy(factors, y, x)


def rescale(x: Vector, like: Vector, granularity: str, epsilon: float = 0.0) -> Vector:
    r"""Return the direction of ``x`` with the magnitude of ``like``; zero where ``x`` is zero.

    ``'global'``: :math:`x \lVert \text{like} \rVert / (\lVert x \rVert + \epsilon)`; ``'tensor'``: the same for every
    parameter's tensor; ``'elementwise'``: :math:`\operatorname{sign}(x) |\text{like}|`.
    """
    if granularity == 'elementwise':
        return multiply(sign(x), absolute(like))
    if granularity == 'global':
        wanted, length = (square.sqrt() for square in dots((like, like), (x, x)))
        return scale(x, quotient(wanted, length + epsilon))
    wanted, lengths = norms(like), norms(x)
    return scale(x, _per_tensor(lambda w, n: quotient(w, n + epsilon), (like, wanted), (x, lengths)))


def _per_tensor(
    function: Callable[[Tensor, Tensor], Tensor],
    first: tuple[Vector, list[Tensor]],
    second: tuple[Vector, list[Tensor]],
) -> PerParameter:
    """Return a function of two numbers that vectors have for their parameters; 0 for parameters that lack one."""
    (x, of_x), (y, of_y) = first, second
    others = dict(zip(y.where, of_y, strict=True))
    results = [torch.zeros((), device=value.device) for value in x.layout.parameters]
    for place, number in zip(x.where, of_x, strict=True):
        if place in others:
            results[place] = function(number, others[place])
    return PerParameter(results)


def spatial_mean(x: Vector) -> Vector:
    """Return ``x``, its convolution kernels (3 to 5 dimensions) averaged over space, its other tensors unchanged."""

    def averaged(value: Tensor) -> Tensor:
        spatial = tuple(range(2, value.dim()))
        return value.mean(dim=spatial, keepdim=True).expand_as(value) if 3 <= value.dim() <= 5 else value

    return x.like([averaged(value) for value in x.values])


def rademacher(layout: Layout, seed: int) -> Vector:
    """Return a vector of random signs: the same on every rank for the same seed, and from a separate random stream."""
    generators: dict[torch.device, torch.Generator] = {}
    values: list[Tensor] = []
    for parameter in layout.parameters:
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
        # Drawn contiguously: in another memory format torch fills the elements in another order.
        bits = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        bits.bernoulli_(generator=generators[parameter.device])
        values.append(torch.empty_like(parameter, requires_grad=False).copy_(bits).mul_(2).sub_(1))
    return Vector(values, range(len(values)), layout)

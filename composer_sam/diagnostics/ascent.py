"""Projected gradient ascent: the maximum of a function of the weights in a ball around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from composer_sam.diagnostics.checks import NotFiniteError, check_at_least, check_positive
from composer_sam.diagnostics.objective import Objective
from composer_sam.vectors import Vector, add, multiply, norm, scale, to_radius

__all__ = ['Maximum', 'check_ascent', 'check_eta', 'maximise']

_ASCENTS = ('first_order', 'projected')
# A smaller step, relative to the radius, changes less than rounding does.
_SMALLEST_STEP = 1e-6

# From an offset of the weights to the value and the gradient of the function at w + offset.
Function = Callable[[Sequence[Tensor]], tuple[float, list[Tensor]]]


@dataclass(frozen=True)
class Maximum:
    """The values of a function that :func:`maximise` found.

    Attributes:
        centre: the value at the weights.
        first_order: the value at the first-order solution.
        value: the largest value found.
    """

    centre: float
    first_order: float
    value: float


@dataclass(frozen=True)
class _Point:
    """A point of the ball in the coordinates u, with the value there and the gradient with respect to u."""

    u: Vector | None  # None: the centre
    value: float
    gradient: Vector


def maximise(
    objective: Objective,
    function: Function,
    rho: float,
    *,
    metric: Vector | None = None,
    steps: int = 0,
    seed: int = 0,
) -> Maximum:
    r"""Search :math:`\max F(e)` over :math:`\lVert T^{-1} e \rVert \le \rho`.

    In the coordinates u with :math:`e = T u` the ball is round. The ascent starts at the first-order solution
    :math:`u = \rho \, T g / \lVert T g \rVert`, where g is the gradient at the centre. A step goes along
    :math:`T \nabla F(T u)` and is projected onto the ball; the first step is as long as the radius. The rate is doubled
    after a step that increases F. Otherwise the step is rejected and the rate is divided by 4, so F never decreases.
    If g is zero, the ascent starts at a random point and ``first_order`` is the value at the centre.

    Args:
        objective: holds the weights w.
        function: returns F and its gradient at w + e.
        rho: the radius :math:`\rho`.
        metric: the diagonal of T, >= 0; None for the identity.
        steps: the number of evaluations after the first-order solution.
        seed: the seed of the random start.

    Raises:
        NotFiniteError: F is not finite, at the weights or in the ball.
    """

    def evaluate(u: Vector | None) -> _Point:
        offset = objective.zeros() if u is None else (u if metric is None else multiply(u, metric)).values
        value, gradient = function(offset)
        if not math.isfinite(value):
            where = 'the weights' if u is None else f'an offset within rho={rho}; a smaller rho may help'
            raise NotFiniteError(f'the measured function is {value} at {where}')
        slope = objective.vector(gradient)
        return _Point(u, value, slope if metric is None else multiply(slope, metric))

    centre = best = evaluate(None)
    start = centre.gradient
    flat = not float(norm(start))
    if flat:
        start = objective.vector(objective.gaussian(seed))
    edge = centre if flat and not steps else evaluate(to_radius(start, rho, 0.0))
    first_order = centre.value if flat else edge.value
    best = edge if edge.value >= centre.value else centre
    rate = 0.0
    for _ in range(steps):
        slope = float(norm(best.gradient))
        if not slope:
            break
        # A longer step is projected to the same point: only its direction matters.
        rate = min(rate or rho / slope, rho / slope / _SMALLEST_STEP)
        if rate * slope < _SMALLEST_STEP * rho:
            break
        step = scale(best.gradient, rate)
        point = evaluate(_onto_ball(step if best.u is None else add(best.u, step), rho))
        if point.value > best.value:
            best = point
            rate *= 2
        else:
            rate /= 4
    return Maximum(centre.value, first_order, best.value)


def _onto_ball(u: Vector, rho: float) -> Vector:
    length = float(norm(u))
    return u if length <= rho else scale(u, rho / length)


def check_ascent(rho: float, ascent: str, steps: int) -> None:
    """Raise ValueError for a radius, a kind of ascent or a number of steps out of range."""
    check_positive('rho', rho)
    check_at_least('steps', steps, 0)
    if ascent not in _ASCENTS:
        raise ValueError(f'ascent must be one of {", ".join(map(repr, _ASCENTS))}, got {ascent!r}')


def check_eta(eta: float) -> None:
    """Raise ValueError for anything but a finite number >= 0."""
    if not 0 <= eta < math.inf:
        raise ValueError(f'eta must be a finite number >= 0, got {eta!r}')

"""Mathematics on weight-space vectors: one tensor per parameter, treated as one long vector.

Every function reads like the formula it computes, works on all tensors at once (``torch._foreach_*``) and is exact
over shards: a norm or an inner product counts every element of the model once, on whatever rank, and accumulates in
at least fp32. Nothing here waits for the device: scalars stay 0-dimensional tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from composer_sam.vectors import multi_tensor
from composer_sam.vectors.layout import Layout
from composer_sam.vectors.vector import Coefficient, Number, PerParameter, Vector

__all__ = [
    'Coefficient',
    'Number',
    'PerParameter',
    'Vector',
    'absolute',
    'add',
    'axpy',
    'clip',
    'dot',
    'dots',
    'each',
    'join',
    'multiply',
    'norm',
    'norms',
    'ones_like',
    'rademacher',
    'reject',
    'rescale',
    'restrict',
    'scale',
    'share',
    'sign',
    'spatial_mean',
    'subtract',
    'to_radius',
]

_HALF = (torch.float16, torch.bfloat16)

Result = TypeVar('Result', bound=float | Tensor)


def each(function: Callable[..., Result], *numbers: Number) -> Result | PerParameter:
    """Return ``function(*numbers)``, one result per parameter if one of the numbers differs between parameters.

    Equal arguments share one result, so that one multi-tensor call can apply it.
    """
    lengths = [len(number) for number in numbers if isinstance(number, PerParameter)]
    if not lengths:
        return function(*numbers)
    columns = [number if isinstance(number, PerParameter) else (number,) * lengths[0] for number in numbers]
    rows = list(zip(*columns, strict=True))
    results = {row: function(*row) for row in set(rows)}
    return PerParameter(results[row] for row in rows)


def norm(x: Vector) -> Tensor:
    r"""Return the L2 norm :math:`\lVert x \rVert` over all elements of all ranks' shards, a 0-dimensional tensor."""
    return dots((x, x))[0].sqrt()


def norms(x: Vector) -> list[Tensor]:
    """Return the L2 norm of each parameter's tensor, over all its shards, in the order of ``x.where``."""
    squares = _inner(x.values, x.values, x.layout.accumulator)
    squares = x.layout.totals(squares, x.where) if x.layout.sharded else squares
    return [square.sqrt() for square in squares]


def dot(x: Vector, y: Vector) -> Tensor:
    r"""Return the inner product :math:`\langle x, y \rangle` over all elements of all ranks' shards."""
    return dots((x, y))[0]


def dots(*pairs: tuple[Vector, Vector]) -> list[Tensor]:
    """Return the inner products of several pairs of vectors, by one collective."""
    together = _aligned(*(vector for pair in pairs for vector in pair))
    columns: list[list[Tensor]] = []
    factors: list[float] = []
    for x, y in zip(together[::2], together[1::2], strict=True):
        (a, a_factor), (b, b_factor) = x.terms(), y.terms()
        columns.append(_inner(a, b, x.layout.accumulator))
        factors.append(a_factor * b_factor)
    sums = together[0].layout.sums(columns, together[0].where)
    return [total if factor == 1 else total * factor for total, factor in zip(sums, factors, strict=True)]


def scale(x: Vector, factor: Coefficient) -> Vector:
    """Return ``factor * x``, in place if ``x`` is donated. Products of half-precision tensors are rounded once."""
    half = _half(x)
    factor = factor if half else _number(factor)
    if not x.donated and not half and not isinstance(factor, PerParameter):
        return x.like(multi_tensor.multiply(x.values, factor))
    if x.donated and not half and isinstance(factor, float):
        return x.times(factor)
    values = x.values if x.donated else [value.clone() for value in x.values]
    for chosen, c in _by_factor(values, x.where, factor):
        if half and isinstance(c, Tensor):
            # A 0-dimensional factor would itself be rounded to the half type first (0.4% off in bf16); a
            # 1-dimensional one takes part in type promotion.
            multi_tensor.multiply_(chosen, [c.reshape(1) if value.dim() else c for value in chosen])
        else:
            multi_tensor.multiply_(chosen, c)
    return x.like(values)


def add(x: Vector, y: Vector) -> Vector:
    """Return ``x + y``, in the memory of ``x`` or ``y`` if one is donated."""
    if y.donated and not x.donated:
        x, y = y, x
    return axpy(1.0, y, x)


def subtract(x: Vector, y: Vector) -> Vector:
    """Return ``x - y``, in the memory of ``x`` if it is donated."""
    return axpy(-1.0, y, x)


def axpy(a: Coefficient, x: Vector, y: Vector) -> Vector:
    """Return ``a * x + y``, in the memory of ``y`` if it is donated."""
    a = a if _half(x) else _number(a)
    if not isinstance(a, (int, float)):
        return add(scale(x, a), y)
    x, y = _aligned(x, y)
    values, factor = x.terms()
    if not y.donated:
        return y.like(multi_tensor.add(y.values, values, a * factor))
    multi_tensor.add_(y.values, values, a * factor)
    return y.like(y.values)


def multiply(x: Vector, y: Vector) -> Vector:
    """Return the elementwise product, in the memory of ``x`` if it is donated; zero where either has no entry."""
    x, y = restrict(x, y.where), restrict(y, x.where)
    if not x.donated:
        return x.like(multi_tensor.multiply(x.values, y.values))
    multi_tensor.multiply_(x.values, y.values)
    return x.like(x.values)


def absolute(x: Vector, plus: float = 0.0) -> Vector:
    """Return ``|x| + plus``, elementwise."""
    values = multi_tensor.absolute(x.values)
    if plus:
        multi_tensor.add_(values, plus)
    return x.like(values)


def sign(x: Vector) -> Vector:
    """Return the sign of every element: -1, 0 or 1."""
    return x.like(multi_tensor.sign(x.values))


def ones_like(x: Vector) -> Vector:
    """Return a vector with 1 in every element that ``x`` has."""
    return x.like([torch.ones_like(value) for value in x.values])


def join(x: Vector, y: Vector) -> Vector:
    """Return two vectors on different parameters as one vector."""
    pairs = sorted(zip((*x.where, *y.where), (*x.values, *y.values), strict=True), key=lambda pair: pair[0])
    return Vector([value for _, value in pairs], [place for place, _ in pairs], x.layout)


def rescale(x: Vector, like: Vector, granularity: str) -> Vector:
    r"""Return the direction of ``x`` with the magnitude of ``like``; zero where ``x`` is zero.

    ``'global'``: :math:`x \lVert \text{like} \rVert / \lVert x \rVert`; ``'tensor'``: the same for every parameter's
    tensor; ``'elementwise'``: :math:`\operatorname{sign}(x) |\text{like}|`.
    """
    if granularity == 'elementwise':
        return multiply(sign(x), absolute(like))
    if granularity == 'global':
        wanted, length = (square.sqrt() for square in dots((like, like), (x, x)))
        return scale(x, _quotient(wanted, length))
    lengths = dict(zip(like.where, norms(like), strict=True))
    ratios = [torch.zeros((), device=value.device) for value in x.layout.parameters]
    for place, length in zip(x.where, norms(x), strict=True):
        if place in lengths:
            ratios[place] = _quotient(lengths[place], length)
    return scale(x, PerParameter(ratios))


def spatial_mean(x: Vector) -> Vector:
    """Return ``x``, its convolution kernels (3 to 5 dimensions) averaged over space, its other tensors unchanged."""

    def averaged(value: Tensor) -> Tensor:
        spatial = tuple(range(2, value.dim()))
        return value.mean(dim=spatial, keepdim=True).expand_as(value) if 3 <= value.dim() <= 5 else value

    return x.like([averaged(value) for value in x.values])


def share(condition: Callable[[Tensor, Tensor], Tensor], x: Vector, y: Vector) -> Tensor:
    """Return the share of elements, over all ranks' shards, for which ``condition`` holds; 0 if there is no element.

    Raises:
        ValueError: the parameters are flat, so that they hold padding beside the weights.
    """
    x, y = _aligned(x, y)
    layout = x.layout
    if layout.padded:
        raise ValueError('entries of flat parameters cannot be counted: wrap the model with use_orig_params=True')
    none = [torch.zeros((), dtype=torch.int64, device=value.device) for value in layout.parameters]
    counts, sizes = dict(enumerate(none)), dict(enumerate(none))
    for place, a, b in zip(x.where, x.values, y.values, strict=True):
        counts[place] = torch.count_nonzero(condition(a, b))
        sizes[place] = torch.full_like(none[place], a.numel())
    # An entry for every parameter: ranks without any element take part with zeros of the same type.
    count, size = layout.sums([list(counts.values()), list(sizes.values())], list(counts))
    return count / size.clamp(min=1)


def rademacher(layout: Layout, seed: int) -> Vector:
    """Return a vector of random signs: the same on every rank for the same seed, and from a separate random stream."""
    generators: dict[torch.device, torch.Generator] = {}
    values: list[Tensor] = []
    for parameter in layout.parameters:
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
        bits = torch.empty_like(parameter, requires_grad=False).bernoulli_(generator=generators[parameter.device])
        values.append(bits.mul_(2).sub_(1))
    return Vector(values, range(len(values)), layout)


def restrict(x: Vector, where: Iterable[int]) -> Vector:
    """Return ``x`` on the parameters ``where``, zero on all others; it shares the memory of ``x``."""
    kept = set(where)
    if kept.issuperset(x.where):
        return x
    pairs = [(value, place) for value, place in zip(x.values, x.where, strict=True) if place in kept]
    return Vector([value for value, _ in pairs], [place for _, place in pairs], x.layout, x.donated)


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

    def factor(radius: float, eps: float) -> Tensor:
        return torch.where(of == 0, torch.zeros_like(of), radius / (of + eps))

    found = each(factor, rho, epsilon)
    number = _number(found)
    # A multiple with a pending factor needs no memory.
    return x.times(number) if isinstance(number, float) and not _half(x) else scale(x, found)


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
    cosine = _quotient(xy, x_norm * y_norm + epsilon)
    return axpy(_quotient(cosine * x_norm, y_norm + epsilon).neg(), y, x)


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return numerator / denominator; 0 where the denominator is 0, which happens here only for a zero vector."""
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)


def _inner(x: list[Tensor], y: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the inner product of each pair of tensors, accumulated in ``dtype``."""
    if x is y and not all(v.device.type == 'cpu' and v.dtype == dtype and v.is_contiguous() for v in x):
        return [length.square() for length in multi_tensor.norm(x, dtype=dtype)]
    # BLAS reads memory faster than the norm does, and memory limits the speed of a step on the CPU.
    return [torch.dot(a.reshape(-1).to(dtype), b.reshape(-1).to(dtype)) for a, b in zip(x, y, strict=True)]


def _aligned(*vectors: Vector) -> tuple[Vector, ...]:
    """Return the vectors over the same parameters: an entry that only some of them have is zero in the others."""
    if len({vector.where for vector in vectors}) == 1:
        return vectors
    union = sorted({place for vector in vectors for place in vector.where})
    templates = {place: value for v in vectors for place, value in zip(v.where, v.values, strict=True)}

    def over_union(v: Vector) -> Vector:
        own = dict(zip(v.where, v.values, strict=True))
        values = [own[i] if i in own else torch.zeros_like(templates[i]) for i in union]
        return Vector(values, union, v.layout, v.donated)

    return tuple(over_union(vector) for vector in vectors)


def _half(x: Vector) -> bool:
    return any(value.dtype in _HALF for value in x.terms()[0])


def _number(factor: Coefficient) -> Coefficient:
    """Return the factor as a number if that needs no wait: it is in CPU memory and equal for all parameters."""
    if isinstance(factor, PerParameter) and factor and len({id(c) for c in factor}) == 1:
        factor = factor[0]
    return factor.item() if isinstance(factor, Tensor) and factor.device.type == 'cpu' else factor


def _by_factor(
    values: list[Tensor], where: tuple[int, ...], factor: Coefficient
) -> list[tuple[list[Tensor], float | Tensor]]:
    """Group the values by their factor, so that there is one multi-tensor call per different factor."""
    if not isinstance(factor, PerParameter):
        return [(values, factor)]
    chosen: dict[int, tuple[list[Tensor], float | Tensor]] = {}
    for value, place in zip(values, where, strict=True):
        chosen.setdefault(id(factor[place]), ([], factor[place]))[0].append(value)
    return list(chosen.values())

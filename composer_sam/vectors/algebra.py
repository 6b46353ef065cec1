"""Mathematics on weight-space vectors: one tensor per parameter, treated as one long vector.

Every function reads like the formula it computes, works on all tensors at once (``torch._foreach_*``) and is exact
over shards: a norm or an inner product counts every element of the model once, on whatever rank, and accumulates in
at least fp32. Nothing here waits for the device: scalars stay 0-dimensional tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import compress
from typing import TypeVar

import torch
from torch import Tensor

from composer_sam.vectors import multi_tensor
from composer_sam.vectors.vector import Coefficient, Number, PerParameter, Vector

__all__ = [
    'Coefficient',
    'Number',
    'PerParameter',
    'Vector',
    'absolute',
    'add',
    'aligned',
    'as_number',
    'axpy',
    'complement',
    'divide',
    'dot',
    'dots',
    'duplicate',
    'each',
    'half_precision',
    'inner_products',
    'join',
    'multiply',
    'negative',
    'norm',
    'norms',
    'ones_like',
    'quotient',
    'restrict',
    'scale',
    'share',
    'sign',
    'subtract',
]

_HALF = frozenset((torch.float16, torch.bfloat16))

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


def complement(number: Number) -> Number:
    """Return 1 - number."""
    return each(_complement, number)


def _complement(number: float) -> float:
    return 1 - number


def negative(number: Number) -> Number:
    """Return -number."""
    return each(_negative, number)


def _negative(number: float) -> float:
    return -number


def norm(x: Vector) -> Tensor:
    r"""Return the L2 norm :math:`\lVert x \rVert` over all elements of all ranks' shards, a 0-dimensional tensor."""
    return dots((x, x))[0].sqrt()


def norms(x: Vector) -> list[Tensor]:
    """Return the L2 norm of each parameter's tensor, over all its shards, in the order of ``x.where``."""
    return [square.sqrt() for square in inner_products(x, x)]


def inner_products(x: Vector, y: Vector) -> list[Tensor]:
    """Return the inner product of each parameter's tensors, over all shards; both must have the same parameters."""
    partials = _inner(x.values, y.values, x.layout.accumulator)
    return x.layout.totals(partials, x.where) if x.layout.sharded else partials


def dot(x: Vector, y: Vector) -> Tensor:
    r"""Return the inner product :math:`\langle x, y \rangle` over all elements of all ranks' shards."""
    return dots((x, y))[0]


def dots(*pairs: tuple[Vector, Vector]) -> list[Tensor]:
    """Return the inner products of several pairs of vectors, by one collective."""
    together = aligned(*(vector for pair in pairs for vector in pair))
    columns: list[list[Tensor]] = []
    factors: list[float] = []
    for x, y in zip(together[::2], together[1::2], strict=True):
        columns.append(_partials(x, y))
        factors.append(x.terms()[1] * y.terms()[1])
    sums = together[0].layout.sums(columns, together[0].where)
    return [total if factor == 1 else total * factor for total, factor in zip(sums, factors, strict=True)]


def scale(x: Vector, factor: Coefficient) -> Vector:
    """Return ``factor * x``, in place if ``x`` is donated. Products of half-precision tensors are rounded once."""
    half = half_precision(x)
    factor = as_number(factor, half)
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
    a = as_number(a, half_precision(x))
    if not isinstance(a, (int, float)):
        return add(scale(x, a).donate(), y)  # nothing else uses the product
    x, y = aligned(x, y)
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


def divide(x: Vector, y: Vector) -> Vector:
    """Return the elementwise quotient, in the memory of ``y`` if it is donated; both must have the same parameters."""
    values = multi_tensor.reciprocal(y.values)
    multi_tensor.multiply_(values, x.values)
    return x.like(values)


def duplicate(x: Vector) -> Vector:
    """Return a copy of ``x`` in memory of its own."""
    return x.like([value.clone() for value in x.values])


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


def share(condition: Callable[[Tensor, Tensor], Tensor], x: Vector, y: Vector) -> Tensor:
    """Return the share of elements, over all ranks' shards, for which ``condition`` holds; 0 if there is no element.

    Raises:
        ValueError: the parameters are flat, so that they hold padding beside the weights.
    """
    x, y = aligned(x, y)
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


def restrict(x: Vector, where: Iterable[int]) -> Vector:
    """Return ``x`` on the parameters ``where``, zero on all others; it shares the memory of ``x``."""
    kept = set(where)
    if kept.issuperset(x.where):
        return x
    pairs = [(value, place) for value, place in zip(x.values, x.where, strict=True) if place in kept]
    return Vector([value for value, _ in pairs], [place for _, place in pairs], x.layout, x.donated)


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return numerator / denominator; 0 where the denominator is 0, which happens here only for a zero vector."""
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)


def _partials(x: Vector, y: Vector) -> list[Tensor]:
    """Return parts of the inner product of two vectors on the same parameters, without their factors, on this rank."""
    (a, _), (b, _), layout = x.terms(), y.terms(), x.layout
    chosen = [place in layout.small for place in x.where] if layout.small else []
    if chosen.count(True) < 2:
        return _inner(a, b, layout.accumulator)

    def divided(values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        rest = [value for value, its in zip(values, chosen, strict=True) if not its]
        return multi_tensor.flatten(list(compress(values, chosen))), rest

    left, a_rest = divided(a)
    right, b_rest = (left, a_rest) if a is b else divided(b)
    # Not BLAS, which takes two threads for as little as this, and then waits for them.
    return [(left * right).sum(), *_inner(a_rest, b_rest, layout.accumulator)]


def _inner(x: list[Tensor], y: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the inner product of each pair of tensors, accumulated in ``dtype``."""
    if x is y and not all(v.is_cpu and v.dtype == dtype and v.is_contiguous() for v in x):
        return [length.square() for length in multi_tensor.norm(x, dtype=dtype)]
    # BLAS reads memory faster than the norm does, and memory limits the speed of a step on the CPU.
    if x is y:
        return [torch.dot(a, a) for a in (value.reshape(-1) for value in x)]
    return [torch.dot(a.reshape(-1).to(dtype), b.reshape(-1).to(dtype)) for a, b in zip(x, y, strict=True)]


def aligned(*vectors: Vector) -> tuple[Vector, ...]:
    """Return the vectors over the same parameters: an entry that only some of them have is zero in the others."""
    first = vectors[0]
    if all(vector is first or vector.where == first.where for vector in vectors):
        return vectors
    union = sorted({place for vector in vectors for place in vector.where})
    templates = {place: value for v in vectors for place, value in zip(v.where, v.values, strict=True)}

    def over_union(v: Vector) -> Vector:
        own = dict(zip(v.where, v.values, strict=True))
        values = [own[i] if i in own else torch.zeros_like(templates[i]) for i in union]
        return Vector(values, union, v.layout, v.donated)

    return tuple(over_union(vector) for vector in vectors)


def half_precision(x: Vector) -> bool:
    return not _HALF.isdisjoint({value.dtype for value in x.terms()[0]})


def as_number(factor: Coefficient, half: bool) -> Coefficient:
    """Return the factor as a number if it is equal for all parameters and needs no wait.

    A tensor in CPU memory needs none; it stays a tensor if it is for a vector in ``half`` precision, for :func:`scale`.
    """
    if isinstance(factor, PerParameter) and factor and len({id(c) for c in factor}) == 1:
        factor = factor[0]
    return factor.item() if isinstance(factor, Tensor) and factor.is_cpu and not half else factor


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

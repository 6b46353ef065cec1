"""Mathematics on weight-space vectors: one tensor per parameter, treated as one long vector.

Every function reads like the formula it computes, works on all tensors at once (``torch._foreach_*``) and is exact
over shards: a norm or an inner product counts every element of the model once, wherever it lives, and accumulates in
at least fp32. Nothing here waits for the device: scalars stay 0-dimensional tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from composer_sam.distributed import Layout

__all__ = [
    'Coefficient',
    'Number',
    'PerParameter',
    'Vector',
    'add',
    'axpy',
    'dot',
    'norm',
    'scale',
    'subtract',
    'to_radius',
]

_HALF = (torch.float16, torch.bfloat16)


class PerParameter(tuple):
    """One number per parameter of the model: a hyper-parameter whose value differs between parameter groups."""


# A hyper-parameter: one number, or one for each parameter where groups differ.
Number: TypeAlias = float | PerParameter
Coefficient: TypeAlias = float | Tensor | PerParameter


class Vector:
    """A point or a direction in weight space.

    Args:
        values: the local tensors of the parameters that are not structurally zero.
        where: for each of them the parameter's place in ``layout.parameters``, ascending. A parameter that got no
            gradient has no entry: it is zero, and it costs nothing.
        layout: the parameters and how they are spread over ranks.
        donated: the memory may be overwritten by the next operation, see :meth:`donate`.
    """

    __slots__ = ('_values', 'donated', 'layout', 'where')

    def __init__(self, values: Sequence[Tensor], where: Sequence[int], layout: Layout, donated: bool = False):
        self._values: list[Tensor] | None = list(values)
        self.where = tuple(where)
        self.layout = layout
        self.donated = donated

    @property
    def values(self) -> list[Tensor]:
        if self._values is None:
            raise RuntimeError('this vector was donated: its memory has been reused, so it cannot be read any more')
        return self._values

    def donate(self) -> Vector:
        """Hand the memory on: the result may be overwritten in place, and this vector can no longer be read.

        What a method does not need again it donates, and a parameter-sized copy is saved:
        ``to_radius(grad.donate(), rho)`` scales the gradient where it lies.
        """
        moved = Vector(self.values, self.where, self.layout, donated=True)
        self._values = None
        return moved

    def like(self, values: Sequence[Tensor], donated: bool = False) -> Vector:
        """A vector of other values on the same parameters."""
        return Vector(values, self.where, self.layout, donated)


def norm(x: Vector) -> Tensor:
    r"""The L2 norm :math:`\lVert x \rVert` over all elements of all ranks' shards, a 0-dimensional tensor."""
    values = x.values
    lengths = torch._foreach_norm(values, 2, dtype=x.layout.accumulator) if values else []
    if not x.layout.sharded and lengths:
        return torch.linalg.vector_norm(x.layout.stack(lengths))
    return x.layout.total([length.square() for length in lengths], x.where).sqrt()


def dot(x: Vector, y: Vector) -> Tensor:
    r"""The inner product :math:`\langle x, y \rangle` over all elements of all ranks' shards."""
    x, y = _aligned(x, y)
    dtype = x.layout.accumulator
    products = [
        torch.dot(a.reshape(-1).to(dtype), b.reshape(-1).to(dtype)) for a, b in zip(x.values, y.values, strict=True)
    ]
    return x.layout.total(products, x.where)


def scale(x: Vector, factor: Coefficient) -> Vector:
    """``factor * x``; in place where ``x`` is donated. Products of half-precision tensors are rounded once."""
    half = any(value.dtype in _HALF for value in x.values)
    if not x.donated and not half and not isinstance(factor, PerParameter):
        return x.like(_multi(torch._foreach_mul, x.values, factor))
    values = x.values if x.donated else [value.clone() for value in x.values]
    for chosen, c in _by_factor(values, x.where, factor):
        if half and isinstance(c, Tensor):
            # A 0-dimensional factor would itself be rounded to the half type first (0.4% off in bf16); a
            # 1-dimensional one takes part in type promotion.
            _multi(torch._foreach_mul_, chosen, [c.reshape(1) if value.dim() else c for value in chosen])
        else:
            _multi(torch._foreach_mul_, chosen, c)
    return x.like(values, donated=x.donated)


def add(x: Vector, y: Vector) -> Vector:
    """``x + y``, in the memory of whichever of the two is donated."""
    if y.donated and not x.donated:
        x, y = y, x
    x, y = _aligned(x, y)
    if not x.donated:
        return x.like(_multi(torch._foreach_add, x.values, y.values))
    _multi(torch._foreach_add_, x.values, y.values)
    return x


def subtract(x: Vector, y: Vector) -> Vector:
    """``x - y``, in the memory of ``x`` where it is donated."""
    x, y = _aligned(x, y)
    if not x.donated:
        return x.like(_multi(torch._foreach_sub, x.values, y.values))
    _multi(torch._foreach_sub_, x.values, y.values)
    return x


def axpy(a: Coefficient, x: Vector, y: Vector) -> Vector:
    """``a * x + y``, in the memory of whichever of the two is donated."""
    return add(scale(x, a), y)


def to_radius(x: Vector, rho: Number, epsilon: Number = 1e-12) -> Vector:
    r"""The vector along ``x`` of length ``rho``: the ascent step of the first-order methods.

    .. math:: e = \rho \, \frac{x}{\lVert x \rVert + \epsilon}

    The zero vector stays zero, also for ``epsilon=0``. Where groups have a ``rho`` of their own the norm is still the
    one norm over all parameters. In place where ``x`` is donated.
    """
    length = norm(x)

    def factor(radius: float, eps: float) -> Tensor:
        return torch.where(length == 0, torch.zeros_like(length), radius / (length + eps))

    if not isinstance(rho, PerParameter) and not isinstance(epsilon, PerParameter):
        return scale(x, factor(rho, epsilon))
    count = len(x.layout.parameters)
    radii = rho if isinstance(rho, PerParameter) else (rho,) * count
    epsilons = epsilon if isinstance(epsilon, PerParameter) else (epsilon,) * count
    pairs: list[tuple[float, float]] = list(zip(radii, epsilons, strict=True))
    factors = {pair: factor(*pair) for pair in set(pairs)}
    return scale(x, PerParameter(factors[pair] for pair in pairs))


def _multi(operation: Callable[..., Any], values: list[Tensor], *others: Any) -> Any:
    """A multi-tensor operation; torch itself refuses an empty list, such as a rank whose shards are all empty."""
    return operation(values, *others) if values else []


def _aligned(x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """Both vectors over the same parameters: a structural zero that meets a value is written out."""
    if x.where == y.where:
        return x, y
    union = sorted({*x.where, *y.where})
    templates = {**dict(zip(y.where, y.values, strict=True)), **dict(zip(x.where, x.values, strict=True))}

    def over_union(v: Vector) -> Vector:
        own = dict(zip(v.where, v.values, strict=True))
        values = [own[i] if i in own else torch.zeros_like(templates[i]) for i in union]
        return Vector(values, union, v.layout, v.donated)

    return over_union(x), over_union(y)


def _by_factor(values: list[Tensor], where: tuple[int, ...], factor: Coefficient) -> list[tuple[list[Tensor], Any]]:
    """The values that share a factor, with that factor: as many multi-tensor calls as there are different factors."""
    if not isinstance(factor, PerParameter):
        return [(values, factor)]
    chosen: dict[int, tuple[list[Tensor], Any]] = {}
    for value, place in zip(values, where, strict=True):
        chosen.setdefault(id(factor[place]), ([], factor[place]))[0].append(value)
    return list(chosen.values())

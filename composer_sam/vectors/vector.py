"""A vector in weight space: one tensor per parameter. The operations on it are in ``algebra.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from composer_sam.vectors import multi_tensor
from composer_sam.vectors.layout import Layout

__all__ = ['Coefficient', 'Number', 'PerParameter', 'Vector']


class PerParameter(tuple['float | Tensor', ...]):
    """One number per parameter of the model: a hyper-parameter whose value differs between parameter groups."""


# A hyper-parameter: one number, or one for each parameter where groups differ.
Number: TypeAlias = float | PerParameter
Coefficient: TypeAlias = float | Tensor | PerParameter


class Vector:
    """A point or a direction in weight space.

    Args:
        values: the local tensors of the parameters that are not structurally zero.
        where: for each of them the parameter's index in ``layout.parameters``, ascending. A parameter without a
            gradient has no entry: it is zero and costs nothing.
        layout: the parameters and how they are spread over ranks.
        donated: whether the next operation may overwrite the memory, see :meth:`donate`.
    """

    __slots__ = ('_borrowed', '_factor', '_values', 'donated', 'layout', 'where')

    def __init__(self, values: Sequence[Tensor], where: Sequence[int], layout: Layout, donated: bool = False):
        self._values: list[Tensor] | None = list(values)
        self.where = tuple(where)
        self.layout = layout
        self.donated = donated
        self._factor: float | None = None  # still to be multiplied into the values, see :meth:`times`
        self._borrowed: list[int] | None = None  # versions of the values, if another vector owns them

    @property
    def values(self) -> list[Tensor]:
        values, factor = self.terms()
        if self._factor is not None:
            if self._borrowed is None:
                multi_tensor.multiply_(values, factor)
            else:
                values = self._values = multi_tensor.multiply(values, factor)
            self._factor = self._borrowed = None
        return values

    def terms(self) -> tuple[list[Tensor], float]:
        """Return tensors and a factor whose product is the vector. The tensors may be read, never written."""
        if self._values is None:
            raise RuntimeError('this vector was donated: its memory has been reused, so it cannot be read any more')
        if self._borrowed is not None and self._borrowed != _versions(self._values):
            raise RuntimeError('the vector that this one is a multiple of was overwritten: read .values before that')
        return self._values, 1.0 if self._factor is None else self._factor

    def times(self, factor: float) -> Vector:
        """Return this vector times a number. Reading ``values`` computes the product, in place if this one is donated.

        Placing the weights, sums and norms do not read ``values``: they multiply in the same pass over the memory,
        which limits the speed of a step on the CPU.
        """
        if not self.donated:
            _ = self.values  # computed now: a vector has only one pending factor
        values, own = self.terms()
        product = self.like(values)
        product._factor = own * factor
        product._borrowed = self._borrowed if self.donated else _versions(values)
        return product

    def take(self) -> tuple[list[Tensor], float, bool]:
        """Return :meth:`terms` and whether the tensors may be written to. A donated vector gives its tensors up."""
        values, factor = self.terms()
        free = self.donated and self._borrowed is None
        if self.donated:
            self._values = None
        return values, factor, free

    def donate(self) -> Vector:
        """Give the memory to one operation, which may overwrite it; this vector can no longer be read.

        A method donates what it does not need again and so saves a parameter-sized copy:
        ``to_radius(grad.donate(), rho)`` scales the gradient in place. The operation's result is an ordinary vector
        again.
        """
        moved = Vector(self.terms()[0], self.where, self.layout, donated=True)
        moved._factor, moved._borrowed = self._factor, self._borrowed
        self._values = None
        return moved

    def like(self, values: Sequence[Tensor]) -> Vector:
        """Return a vector of other values on the same parameters."""
        return Vector(values, self.where, self.layout)


def _versions(values: list[Tensor]) -> list[int]:
    return [0 if value.is_inference() else value._version for value in values]

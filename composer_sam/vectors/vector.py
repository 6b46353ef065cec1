"""A vector in weight space: one tensor per parameter. What is computed with it stands in ``algebra.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from composer_sam.vectors.layout import Layout

__all__ = ['Coefficient', 'Number', 'PerParameter', 'Vector']


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

    __slots__ = ('_borrowed', '_factor', '_values', 'donated', 'layout', 'where')

    def __init__(self, values: Sequence[Tensor], where: Sequence[int], layout: Layout, donated: bool = False):
        self._values: list[Tensor] | None = list(values)
        self.where = tuple(where)
        self.layout = layout
        self.donated = donated
        self._factor: float | None = None  # by which the values are still to be multiplied, see :meth:`times`
        self._borrowed: list[int] | None = None  # the values are another vector's, as they were at these versions

    @property
    def values(self) -> list[Tensor]:
        values, factor = self.terms()
        if self._factor is not None:
            if values and self._borrowed is None:
                torch._foreach_mul_(values, factor)
            elif values:  # a rank's shards may all be empty
                values = self._values = list(torch._foreach_mul(values, factor))
            self._factor = self._borrowed = None
        return values

    def terms(self) -> tuple[list[Tensor], float]:
        """Tensors and a factor whose product the vector is. They are read, never written."""
        if self._values is None:
            raise RuntimeError('this vector was donated: its memory has been reused, so it cannot be read any more')
        if self._borrowed is not None and self._borrowed != _versions(self._values):
            raise RuntimeError('the vector this one is a multiple of was overwritten: read .values before')
        return self._values, 1.0 if self._factor is None else self._factor

    def times(self, factor: float) -> Vector:
        """This vector times a number, multiplied out when somebody reads its values: in place where it was donated.

        Placing the weights, sums and norms do not read them: they multiply in the same pass over the memory, which is
        what a step on the CPU waits for.
        """
        if not self.donated:
            _ = self.values  # multiplied out now: one factor can wait in one place only
        values, own = self.terms()
        product = self.like(values)
        product._factor = own * factor
        product._borrowed = self._borrowed if self.donated else _versions(values)
        return product

    def take(self) -> tuple[list[Tensor], float, bool]:
        """:meth:`terms`, and whether the tensors may be written to; a donated vector gives them up."""
        values, factor = self.terms()
        free = self.donated and self._borrowed is None
        if self.donated:
            self._values = None
        return values, factor, free

    def donate(self) -> Vector:
        """Hand the memory to one operation, which may overwrite it; this vector can no longer be read.

        What a method does not need again it donates, and a parameter-sized copy is saved:
        ``to_radius(grad.donate(), rho)`` scales the gradient where it lies. The operation's result is an ordinary
        vector again.
        """
        moved = Vector(self.terms()[0], self.where, self.layout, donated=True)
        moved._factor, moved._borrowed = self._factor, self._borrowed
        self._values = None
        return moved

    def like(self, values: Sequence[Tensor]) -> Vector:
        """A vector of other values on the same parameters."""
        return Vector(values, self.where, self.layout)


def _versions(values: list[Tensor]) -> list[int]:
    return [0 if value.is_inference() else value._version for value in values]

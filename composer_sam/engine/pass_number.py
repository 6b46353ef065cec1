"""The number of a pass, and the part of the batch that the pass sees."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ['PassNumber', 'part_size']

Batch = TypeVar('Batch')


def part_size(fraction: float, samples: int) -> int:
    """Return how many of a number of samples a pass sees: the fraction, rounded up."""
    return math.ceil(fraction * samples)


class PassNumber(int):
    """The number of a pass, from 0, which also cuts the batch to the part that the pass sees.

    Args:
        number: the number.
        fraction: the part of the samples that the pass sees, in (0, 1].
    """

    fraction: float

    def __new__(cls, number: int, fraction: float = 1.0) -> PassNumber:
        made = super().__new__(cls, number)
        made.fraction = fraction
        return made

    def part(self, batch: Batch) -> Batch:
        """Return the first samples of a batch, as many as the pass sees: the whole batch but for ``ascent_fraction``.

        Args:
            batch: a tensor whose first dimension is the samples', or tuples, lists and dictionaries of such.

        Raises:
            ValueError: there is no such tensor in it.
        """
        if self.fraction == 1:
            return batch
        found = False

        def cut(leaf: Any) -> Any:
            nonlocal found
            if not isinstance(leaf, Tensor) or leaf.dim() == 0:
                return leaf
            found = True
            return leaf[: part_size(self.fraction, len(leaf))]

        part = tree_map(cut, batch)
        if not found:
            raise ValueError(
                f'ascent_fraction={self.fraction} cannot cut a batch of type {type(batch).__name__}: it must be a '
                'tensor, or a tuple, list or dictionary of tensors, whose first dimension is the samples'
            )
        return part

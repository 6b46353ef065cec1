"""A data set of the user's own that returns a batch at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

__all__ = ['Samples', 'divided']


class Samples(Dataset):
    """The (tensor, class) samples of any data set with a length, in batches.

    Args:
        source: the data set.
        indices: the samples that are used; all of them if None.
        labels: the classes of these samples, where they replace those of the data set.
    """

    def __init__(self, source: Any, indices: list[int] | None = None, labels: Tensor | None = None) -> None:
        self.source = source
        self.indices = list(range(len(source))) if indices is None else indices
        self._labels = labels

    @property
    def labels(self) -> Tensor:
        """The classes of all samples; to know them every sample is read once."""
        if self._labels is None:
            return torch.tensor([int(self.source[index][1]) for index in self.indices])
        return self._labels

    @labels.setter
    def labels(self, labels: Tensor) -> None:
        self._labels = labels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, labels = self.__getitems__([index])
        return inputs[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        read = [self.source[self.indices[index]] for index in indices]
        inputs = default_collate([sample[0] for sample in read])
        if self._labels is not None:
            return inputs, self._labels[indices]
        return inputs, torch.tensor([int(sample[1]) for sample in read])

    def held_out(self, fraction: float, seed: int) -> tuple[Samples, Samples]:
        """Split off a random ``fraction`` of the samples: return the others, and the fraction."""

        def part(chosen: Tensor) -> Samples:
            labels = None if self._labels is None else self._labels[chosen]
            return Samples(self.source, [self.indices[index] for index in chosen.tolist()], labels)

        rest, few = divided(len(self), fraction, seed)
        return part(rest), part(few)


def divided(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divide the numbers up to ``count`` at random: return the others, and the fraction, each in order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    few = round(fraction * count)
    return order[few:].sort().values, order[:few].sort().values

"""The micro-batches of a step, kept as its first pass saw them, for the passes after it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from composer_sam.engine.streams import RandomStreams, streams_of

__all__ = ['MicroBatches', 'copied', 'copied_leaf']

Batch = TypeVar('Batch')


def copied(batch: Batch) -> Batch:
    """Return a copy of a batch: models and transforms may change theirs in place."""
    return tree_map(copied_leaf, batch)


def copied_leaf(item: Any) -> Any:
    """Return a copy of one part of a batch."""
    # A deep copy would copy the whole storage that a tensor is a slice of.
    return item.detach().clone() if isinstance(item, Tensor) else copy.deepcopy(item)


@dataclass
class MicroBatches:
    """The micro-batches of one step, and the random streams as they were before the forward of each.

    Loading a micro-batch may draw random numbers between two forwards, which a repeated pass does not load again.

    Args:
        devices: those of the model.
    """

    devices: frozenset[torch.device]
    _seen: list[tuple[Any, list[Any] | None]] = field(default_factory=list, init=False)
    _streams: RandomStreams = field(init=False)  # the same ones when they are read and when they are put back

    def __post_init__(self) -> None:
        self._streams = streams_of(self.devices)

    def __len__(self) -> int:
        return len(self._seen)

    def see(self, batch: Any) -> None:
        """Keep a copy of a micro-batch, right before its forward."""
        self._seen.append((copied(batch), self._streams.read()))

    def expect(self, batch: Any) -> None:
        """Keep a copy of a micro-batch that has not come yet: its forward begins where the one before it ends."""
        self._seen.append((copied(batch), None))

    def again(self) -> Iterator[Any]:
        """Yield the micro-batches as they were, each right before its forward."""
        for batch, places in self._seen:
            if places is not None:
                self._streams.write(places)
            yield copied(batch)

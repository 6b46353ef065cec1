"""The control of a Trainer's records in repeated passes: train metrics, outputs, losses and micro-batches."""

from __future__ import annotations

from types import CellType
from typing import Any

from composer.algorithms import GradientClipping
from composer.callbacks import MemoryMonitor
from composer.core import State
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from composer_sam.trainers.batches import copied_leaf

__all__ = ['RecordsControl']


class RecordsControl:
    """The control of train metrics, ``state.outputs``, ``state.loss`` and the micro-batches.

    Train metrics are updated in one pass, the first over the whole batch, and what the trainer shows at BATCH_END is
    from it.
    Every pass gets the micro-batches as they were: an algorithm or a transform that changes them in place (Composer
    allows it) would otherwise change them a second time. GradientClipping would act on every pass's gradient, and
    MemoryMonitor would report every pass. Both are removed until the direction is found; the step then applies them
    once.

    Args:
        state: Composer's ``State``.
        microbatches: the variable Composer's closure reads its micro-batches from.
    """

    _RECORDS = ('outputs', 'loss')

    def __init__(self, state: State, microbatches: CellType):
        self._state = state
        self._metrics = state.train_metrics
        self._batch = state.batch
        self._cell = microbatches
        self._microbatches = microbatches.cell_contents
        self._leaves, self._structure = tree_flatten(self._microbatches)
        self._pristine = [copied_leaf(leaf) for leaf in self._leaves]
        self._records: dict[str, Any] = {}
        self._counted = False
        self._algorithms = list(state.algorithms)
        self._callbacks = list(state.callbacks)
        state.algorithms = [a for a in self._algorithms if not isinstance(a, GradientClipping)]
        state.callbacks = [c for c in self._callbacks if not isinstance(c, MemoryMonitor)]

    def leave_out(self) -> None:
        self._state.train_metrics = {}

    def first_pass_done(self) -> None:
        self._counted = True
        # The trainer may have moved the metrics to its device, which makes a new dictionary.
        self._metrics = self._state.train_metrics
        self._records = {name: getattr(self._state, name) for name in self._RECORDS if hasattr(self._state, name)}

    def rewind(self) -> None:
        if self._metrics is not None:
            self._state.train_metrics = {} if self._counted else self._metrics
        self._cell.cell_contents = tree_unflatten([copied_leaf(leaf) for leaf in self._pristine], self._structure)

    def settle(self) -> None:
        self._state.algorithms = self._algorithms
        self._state.callbacks = self._callbacks
        self._state.train_metrics = self._metrics
        self._state.batch = self._batch
        self._cell.cell_contents = self._microbatches
        for name, value in self._records.items():
            # Detached, because a differentiable backward would keep the graph alive until the next batch.
            setattr(self._state, name, value.detach() if isinstance(value, Tensor) else tree_map(_detached, value))

    def discard(self) -> None:
        self.settle()

    def rollback(self) -> None:
        # The trainer itself clears metrics and records before it retries a batch.
        self.settle()
        for leaf, pristine in zip(self._leaves, self._pristine, strict=True):
            if isinstance(leaf, Tensor):
                leaf.detach().copy_(pristine)


def _detached(item: Any) -> Any:
    return item.detach() if isinstance(item, Tensor) else item

"""A step that is split around a trainer's own work: the trainer evaluates one pass, clips, and calls ``step``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from composer_sam.engine.closures import makes_state
from composer_sam.engine.interrupts import InterruptsHeld
from composer_sam.engine.optimizer import SharpnessAwareOptimizer
from composer_sam.engine.record import StepRecord
from composer_sam.engine.rule import PLAIN, Pass
from composer_sam.engine.transaction import Transaction
from composer_sam.engine.wrappers import outside_of_no_sync, stay_unsynchronised

__all__ = ['Evaluate', 'SplitOptimizer']

# Evaluates one pass over all micro-batches of a step, and returns the loss; None skips the step.
Evaluate = Callable[[Pass], Any]


class SplitOptimizer(SharpnessAwareOptimizer):
    """The wrapper for trainers that call ``step`` after the backward, and call no closure a second time.

    The trainer's loop stays as it is: forward and backward of every micro-batch, clipping, ``step``. Around it an
    adapter calls :meth:`begin` before the first forward and :meth:`finish_passes` after the last backward, which
    evaluates the other passes and leaves the direction in ``.grad``. So the trainer's own forward is the pass whose
    loss, metrics and buffers count, and what the trainer clips, once, is the direction.

    With a ``grad_scaler`` the trainer unscales and steps as ever, so the direction is left scaled. If a pass overflows
    on any rank, gradients of infinity are left on all ranks: the trainer's scaler skips the step and lowers its scale.

    Arguments and attributes are those of :class:`~composer_sam.SharpnessAwareOptimizer`. ``host`` must be one that
    steps by itself.
    """

    _passes: Any = None
    _request = PLAIN  # what the trainer evaluates itself
    _begun = False
    _found: tuple[Transaction | None, StepRecord] | None = None

    @property
    def under_way(self) -> bool:
        """Whether a step has begun, and its direction is not known yet."""
        return self._passes is not None

    def begin(self, evaluate: Evaluate) -> Pass:
        """Begin a step, before the first forward of its first micro-batch; return the pass that the trainer evaluates.

        Args:
            evaluate: evaluates the passes before that one, which see a part of the batch (``ascent_fraction``).
        """
        with self._undone_by_errors(), outside_of_no_sync(self.model):
            request = self._first()
            while request is not None and not request.counts:
                request = self._after(evaluate(request))
        self._request = PLAIN if request is None else request
        return self._request

    def finish_passes(self, loss: Any, evaluate: Evaluate) -> None:
        """Evaluate the other passes, after the last backward of the trainer's own.

        Args:
            loss: that of the trainer's own pass, over all micro-batches.
            evaluate: evaluates a pass over all micro-batches.
        """
        with self._undone_by_errors():
            request = None if self._passes is None else self._after(loss)
            while request is not None:
                request = self._after(evaluate(request))
            self._rescale()

    def requests(self) -> Generator[Pass]:
        """Yield all passes of a step in a loop that evaluates them, and leave the direction in ``.grad``.

        Leaving the loop early, or an exception inside it, undoes the step.
        """
        yield from self._rest(self._first)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """Let the base optimizer step with the direction; do nothing if the step was skipped.

        Args:
            closure: the trainer's own, which evaluates its pass; called once.

        Raises:
            ValueError: the step was not begun.
        """
        loss = None if closure is None else closure()
        if not self._begun:
            self._step_without_begin()
            return loss
        if self._found is None:
            self.give_up()
            return loss
        found, self._found, self._begun = self._found, None, False
        super().take(*found)
        return loss

    def take(self, transaction: Transaction | None, record: StepRecord) -> None:
        """Keep the step until the trainer calls :meth:`step`."""
        if transaction is not None:
            transaction.hold()
        self._found = transaction, record

    def pause(self) -> None:
        """Put the weights back at w between two micro-batches, where the pass that is under way has moved them."""
        if self._transaction is not None:
            self._transaction.placement.pause()

    def resume(self) -> None:
        """Go on with the pass that is under way, before the forward of each micro-batch but the first."""
        if self._transaction is not None:
            self._transaction.placement.resume()
        if not self._request.sync:
            stay_unsynchronised(self.model)

    def give_up(self) -> None:
        """End a step that was begun without an update; weights are at w, and the batch has been seen."""
        passes, self._passes, self._found, self._begun = self._passes, None, None, False
        if passes is not None:
            with InterruptsHeld():
                self.skip()
                passes.close()

    def abandon_step(self) -> None:
        """Undo a step that was begun, as if it had not; do nothing if there is none."""
        with InterruptsHeld():
            passes, found = self._passes, self._found
            self._passes, self._found, self._begun = None, None, False
            if passes is not None:
                passes.close()
            if found is not None and found[0] is not None:
                found[0].rollback()

    # Private parts.

    def _rest(self, begin: Callable[[], Pass | None]) -> Generator[Pass]:
        """Yield the pass that ``begin`` returns and those after it, and leave the direction in ``.grad``."""
        with self._undone_by_errors():
            request = begin()
            while request is not None:
                yield request
                request = self._advance()
            self._rescale()

    def _first(self) -> Pass | None:
        """Begin a step and return its first pass."""
        self.give_up()  # a step that ended without step(): the trainer's scaler skipped it, or its loop was left
        self._passes, self._begun = self.run(), True
        return next(self._passes, None)

    def _after(self, loss: Any) -> Pass | None:
        """End a pass of this loss and return the next one; without a loss, skip the step."""
        if loss is None:
            self.skip()
            self._end_passes()
            return None
        self.note(loss, max(self.pass_index, 0))  # a step of the base optimizer counts no passes
        return self._advance()

    def _advance(self) -> Pass | None:
        """End a pass and return the next one; None if the direction is found, or the step is skipped."""
        if self._transaction is None:
            # The gradient stays as it is: the trainer's own scaler unscales it.
            self._end_passes()
            self.take(None, self.plain_record(self.moment()))
            return None
        request = next(self._passes, None)
        if request is None:
            self._end_passes()
        return request

    def _end_passes(self) -> None:
        passes, self._passes = self._passes, None
        passes.close()

    @contextlib.contextmanager
    def _undone_by_errors(self) -> Generator[None]:
        try:
            yield
        except BaseException:
            self.abandon_step()
            raise

    def _rescale(self) -> None:
        """Leave what the trainer's scaler expects in ``.grad``: a scaled direction, or infinity after an overflow."""
        scaler = self.grad_scaler
        if scaler is None or not scaler.is_enabled():
            return
        if self._found is not None and self._found[0] is None:  # a step of the base optimizer: it was never unscaled
            return
        if self.skipped:
            for parameter in self.trainable():
                parameter.grad = torch.full_like(parameter, torch.inf)
            return
        held = [(parameter, parameter.grad) for parameter in self.trainable() if parameter.grad is not None]
        # Not in place: the method may have staged the same memory.
        scaled: list[Tensor] = scaler.scale([gradient for _, gradient in held])  # pyright: ignore
        for (parameter, _), gradient in zip(held, scaled, strict=True):
            parameter.grad = gradient

    def _step_without_begin(self) -> None:
        if not makes_state(self.param_groups, self.state):
            raise ValueError(
                'step() was called without a forward that the adapter has seen: the trainer must evaluate its batches '
                'by its own training step'
            )
        self.base_optimizer.step()

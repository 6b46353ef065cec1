"""One optimizer step as a transaction: it runs a rule's passes and puts the weights back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from composer_sam.engine.collecting import collecting
from composer_sam.engine.controls import Control, end_skipped
from composer_sam.engine.interrupts import InterruptsHeld
from composer_sam.engine.placement import Placement
from composer_sam.engine.rule import Direction, Observer, Pass, Rule
from composer_sam.engine.step import MEMORY_PREFIX, Step
from composer_sam.engine.wrappers import (
    fsdp1_flattened,
    fsdp1_unsharded,
    must_synchronise,
    own_memory,
    placed_like,
    refuse_reentrant_checkpoints,
    to_rest,
)
from composer_sam.vectors import PerParameter, Vector, add, negative, scale
from composer_sam.vectors.layout import real, several_processes, shaped_like

__all__ = ['Transaction']


class Transaction:
    """One step of one rule: runs its passes, and undoes everything if any of them fails.

    Use it as a context manager: leaving it before ``commit`` or ``skip`` puts weights, buffers and random streams back
    as they were when it was made, and leaves no gradients.

    Args:
        rule: the update rule, with its hyper-parameters as they are at this step.
        step: the step as the rule sees it.
        placement: what places the weights of the step's layout; None for one of its own.
        maximised: places of the parameters in groups with ``maximize=True``. A rule is sent, and returns, gradients of
            what is minimised: those of these parameters are negated on the way in and on the way out.

    Attributes:
        index (int): number of the current pass, from 0; -1 before the first.
        open (bool): whether the step is under way: entered, and neither committed, skipped nor rolled back.
        observer: called with the plain gradient and the direction, once both are known.
        placement: what moves the weights.
    """

    def __init__(
        self, rule: Rule, step: Step, placement: Placement | None = None, maximised: frozenset[int] = frozenset()
    ):
        self.index = -1
        self.open = False
        self.observer: Observer | None = None
        self.layout = step.layout
        self._step = step
        self.placement = placement or Placement(step.layout)
        self._maximised = maximised
        self._controls: Sequence[Control] = ()
        self._rule = rule.direction(step)
        self._counted = False  # whether a pass has counted
        self._gradient: Vector | None = None
        self._last: TensorWeakRef | None = None
        self._direction: Direction | None = None
        self._plain: Vector | None = None
        self._grad_enabled = torch.is_grad_enabled()

    def guard(self, controls: Sequence[Control]) -> None:
        """Set the controls of the state that the passes must not change; the transaction puts it back from now on."""
        self._controls = controls

    def passes(self) -> Iterator[Pass]:
        """Yield the rule's passes one after the other, with the weights in place for each.

        The body of the loop must leave the pass's gradient in the parameters' ``.grad``.
        """
        self._drop_gradients()  # a gradient from before the step belongs to no pass
        request = self._next()
        while request is not None:
            if request.graph or request.outputs is not None:
                with self._around(request):
                    yield request
            else:
                yield request
            request = self._end(request)
        for control in self._controls:
            control.settle()
        if self._plain is not None and self.observer is not None:
            plain, self._plain = self._plain, None
            self.observer(plain, self._whole_direction())

    def write_direction(self) -> None:
        """Put the direction into the parameters' ``.grad`` for the base optimizer."""
        for parameter, value in self._entries(self._signed(self._found().gradients)):
            parameter.grad = value

    def hold(self) -> None:
        """Let :meth:`commit` come later, when the direction is in ``.grad``: leaving the context undoes nothing."""
        self.open = False

    def commit(self, groups: list[dict[str, Any]]) -> None:
        """End the step, right after the base optimizer's: apply what is decoupled, and keep what was staged.

        Args:
            groups: the base optimizer's groups, for their learning rates.
        """
        self._apply_decoupled(groups)
        for name, vector in self._step.staged.items():
            for parameter, value in self._entries(vector):
                self._step.state[parameter][MEMORY_PREFIX + name] = value
        for name, number in self._step.staged_numbers.items():
            # Not elsewhere: Adam takes a state with any key in it for one that it has initialised.
            for where in self._found().gradients.where:
                self._step.state[self.layout.parameters[where]][MEMORY_PREFIX + name] = number
        if several_processes():
            for parameter, ranks in zip(self.layout.parameters, self.layout.groups, strict=True):
                if fsdp1_unsharded(parameter, ranks):
                    # With NO_SHARD, FSDP1's next forward fails if a gradient is in memory that FSDP1 did not allocate.
                    parameter.grad = None
        self._close()

    def skip(self, discard: bool) -> None:
        """End the step without an update, with the weights at w and the random streams as the first pass left them.

        Args:
            discard: put the buffers back too, so that statistics do not include the batch; False keeps the buffers of
                the first pass, as an ordinary step does if its scaled gradient overflows.
        """
        self.placement.restore()
        self._drop_gradients()
        if self.index == 0:  # the first pass is over, though its gradient was not taken
            for control in self._controls:
                control.first_pass_done()
        end_skipped(self._controls, discard)
        self._close()

    def rollback(self) -> None:
        """Undo the step, as if it had not begun."""
        try:
            to_rest(self._step.model)
        finally:
            self.placement.restore()
            self._drop_gradients()
            for control in self._controls:
                control.rollback()
            if not collecting():
                torch.set_grad_enabled(self._grad_enabled)  # an interrupt inside torch.no_grad can leave it off
            self._close()

    def __enter__(self) -> Transaction:
        self.open = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self.open:
            with InterruptsHeld():
                self.rollback()

    # Private parts.

    def _close(self) -> None:
        self.open = False
        self._rule.close()
        self._gradient = self._direction = self._plain = None

    def _apply_decoupled(self, groups: list[dict[str, Any]]) -> None:
        decoupled = self._found().decoupled
        if decoupled is None:
            return
        lr = {parameter: group['lr'] for group in groups for parameter in group['params']}
        rates = PerParameter(lr[parameter] for parameter in self.layout.parameters)
        moved = decoupled.like([real(self.layout.parameters[where]) for where in decoupled.where])
        with torch.no_grad():
            add(moved.donate(), scale(decoupled.donate(), negative(rates)))

    def _end(self, request: Pass) -> Pass | None:
        """End a pass: take its gradient and put the weights back at w; begin the next, and return it."""
        if request.counts:
            self._counted = True
            for control in self._controls:
                control.first_pass_done()
        self._gradient = self._take_gradient(request.graph)
        if self.index == 0 and self.observer is not None:
            self._plain = self._kept(self._gradient, request.sync)
        return self._next()

    @torch.no_grad()
    def _next(self) -> Pass | None:
        """Begin the rule's next pass and return it; None if the rule has returned its direction."""
        self.placement.restore()
        gradient, self._gradient = self._gradient, None
        try:
            asked = next(self._rule) if gradient is None else self._rule.send(gradient)
        except StopIteration as end:
            self._direction = end.value
            return None
        del gradient  # the rule holds it now, or has given it up: its memory may be free
        self.index += 1
        counts = not self._counted and asked.fraction == 1
        for control in self._controls:
            if self.index > 0:
                control.rewind()
            elif not counts:
                control.leave_out()
        if asked.graph:
            self._check_twice_differentiable()
        if asked.at is not None:
            self.placement.place(asked.at)
        sync = asked.sync or must_synchronise(self._step.model)
        if asked.at is None and asked.sync == sync and asked.counts == counts:
            return asked
        # Without the offset: if w + offset was copied, the offset's memory is free during the pass.
        return Pass(None, sync, asked.graph, asked.outputs, asked.fraction, counts)

    @contextlib.contextmanager
    def _around(self, request: Pass) -> Generator[None]:
        """Return the context of a pass whose outputs are watched, or whose gradient is differentiated again."""
        with contextlib.ExitStack() as around:
            if request.outputs is not None:
                around.enter_context(request.outputs.watched())
            if request.graph:
                around.enter_context(refuse_reentrant_checkpoints())
            yield

    def _drop_gradients(self) -> None:
        for parameter in self.layout.parameters:
            parameter.grad = None

    def _take_gradient(self, graph: bool) -> Vector:
        """Take the gradients out of the parameters, so that nothing adds to them or zeroes them in place."""
        parameters = self.layout.parameters
        found = [parameter.grad for parameter in parameters]
        where = [place for place, gradient in enumerate(found) if gradient is not None]
        values = [gradient for gradient in found if gradient is not None]
        self._drop_gradients()
        if {gradient.layout for gradient in values} - {torch.strided}:
            place, sparse = next(pair for pair in zip(where, values, strict=True) if pair[1].layout != torch.strided)
            raise ValueError(
                f'parameter {place} of shape {tuple(parameters[place].shape)} has a gradient of layout '
                f'{sparse.layout}: only dense gradients are supported; use nn.Embedding(..., sparse=False)'
            )
        if not graph:
            values = [value.detach() if value.requires_grad else value for value in values]
        if not self.layout.plain:
            values = [real(placed_like(parameters[place], v)) for v, place in zip(values, where, strict=True)]
        if several_processes():
            values = [own_memory(v, parameters[place]) for v, place in zip(values, where, strict=True)]
        self._check_memory(values, where)
        return self._signed(Vector(values, where, self.layout))

    def _signed(self, x: Vector) -> Vector:
        """Return the vector with the entries of maximised parameters negated."""
        if not self._maximised:
            return x
        pairs = zip(x.values, x.where, strict=True)
        return x.like([-value if place in self._maximised else value for value, place in pairs])

    @torch.no_grad()
    def _kept(self, gradient: Vector, synchronised: bool) -> Vector:
        """Return a copy of the first gradient, averaged over ranks; the method may overwrite the original."""
        copied = gradient.like([value.detach().clone() for value in gradient.values])
        return copied if synchronised else self._step.mean(copied)

    @torch.no_grad()
    def _whole_direction(self) -> Vector:
        """Return the direction including its decoupled part."""
        direction = self._found()
        return direction.gradients if direction.decoupled is None else add(direction.gradients, direction.decoupled)

    def _check_twice_differentiable(self) -> None:
        """Raise ValueError if the gradient of the next pass cannot be differentiated again."""
        flattened = any(fsdp1_flattened(parameter) for parameter in self.layout.parameters)
        if self.layout.sharded or flattened or not self.layout.plain:
            raise ValueError('second derivatives of sharded (FSDP) or complex parameters are not supported')

    def _check_memory(self, values: list[Tensor], where: list[int]) -> None:
        """Raise ValueError if a pass left no gradient, or left it in memory that is in use already."""
        if not values:
            if self.layout.parameters and not self.layout.sharded:
                raise ValueError('no parameter has a gradient after the pass: the closure must call backward()')
            return
        address = values[0].data_ptr()
        last = None if self._last is None else self._last()
        overwritten = last is not None and last.data_ptr() == address
        if address and (overwritten or address == real(self.layout.parameters[where[0]]).data_ptr()):
            raise ValueError(
                'two passes left their gradients in the same memory, as a captured CUDA graph does: put copies into '
                '.grad, for example parameter.grad = static_gradient.clone()'
            )
        # A new tensor object, which lives only as long as the method holds the gradient.
        with torch.set_grad_enabled(values[0].requires_grad):  # a gradient with a graph keeps it
            values[0] = values[0].view_as(values[0])
        self._last = TensorWeakRef(values[0])

    def _found(self) -> Direction:
        if self._direction is None:
            raise RuntimeError('the direction is not known before all passes are done')
        return self._direction

    def _entries(self, vector: Vector) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of a parameter and its tensor of the vector, in the form that the base optimizer expects."""
        pairs = [
            (self.layout.parameters[where], value) for value, where in zip(vector.values, vector.where, strict=True)
        ]
        return pairs if self.layout.plain else [(parameter, shaped_like(parameter, v)) for parameter, v in pairs]

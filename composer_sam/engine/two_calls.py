"""The classic interface without a closure: backward, ``first_step``, backward, ``second_step``."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from composer_sam.engine.controls import Control, end_skipped
from composer_sam.engine.interrupts import InterruptsHeld
from composer_sam.engine.rule import PLAIN
from composer_sam.engine.stepper import Stepper
from composer_sam.engine.streams import RandomStreams, streams_of
from composer_sam.engine.wrappers import is_compiled

__all__ = ['TwoCalls']

log = logging.getLogger(__name__)


class TwoCalls:
    """The passes of an optimizer, driven by two calls.

    The first forward is over when ``first`` is called: it is too late to save the random streams and buffers it began
    with. So hooks save them before the first forward in training mode after a step: of the model or, if it is not
    called itself (``model.loss(x)``), of the first module that is.
    """

    def __init__(self, optimizer: Stepper):
        self._optimizer = weakref.proxy(optimizer)
        self._passes: Any = None
        self._plain: list[tuple[Tensor, Tensor]] | None = None
        # A plain or a skipped step needs no second pass: the effects of the user's second forward are undone.
        self._idle_controls: Sequence[Control] = ()
        self._pending = False
        # Where the random streams were after a first forward that nobody saw beginning.
        self._late: tuple[RandomStreams, list[Any]] | None = None
        self._told = False
        self._watch: _Watch | None = None
        model = optimizer.model
        # TorchScript modules take no hooks.
        if model is not None and not optimizer.host.steps_by_itself and not isinstance(model, torch.jit.ScriptModule):
            self._watch = _Watch(optimizer)
            self._watch.attach(model)

    def check_none_pending(self) -> None:
        if self._pending:
            raise ValueError(
                'second_step() is missing: the order is backward, first_step, backward, second_step '
                '(abandon_step() undoes a step that was begun)'
            )

    @contextlib.contextmanager
    def resting(self) -> Generator[None]:
        """Return the context of a step that is taken by a closure or a loop, whose forwards need no watch."""
        self.check_none_pending()
        if self._watch is not None:
            self._watch.take()
            self._watch.armed = False
            self._watch.leave_parts()
        try:
            yield
        finally:
            if self._watch is not None:
                self._watch.armed = True

    def first(self, zero_grad: bool) -> None:
        optimizer = self._optimizer
        self.check_none_pending()
        if optimizer.method.watches_outputs:
            raise ValueError(
                f'{type(optimizer.method).__name__} watches the outputs of the first forward, which is over when '
                'first_step() is called: use step(closure) or passes()'
            )
        if optimizer.method.passes != 2 or optimizer.method.varies:
            some = 'one or two' if optimizer.method.varies else optimizer.method.passes
            raise ValueError(
                f'{type(optimizer.method).__name__} takes {some} passes, not the two of '
                'first_step() and second_step(): use step(closure) or passes()'
            )
        if optimizer.method.ascent_fraction < 1:
            raise ValueError(
                f'ascent_fraction={optimizer.method.ascent_fraction} needs passes() or step(closure): the two calls do '
                'not know which samples a backward has seen'
            )
        gradients = self._gradients('first_step()')
        kept = [] if zero_grad else [(parameter, gradient.clone()) for parameter, gradient in gradients]
        with self._undone_by_errors():
            controls = () if self._watch is None else self._watch.take()
            if not controls:
                controls = optimizer.controls()
                streams = streams_of(frozenset(parameter.device for parameter, _ in gradients))
                self._late = streams, streams.read()
                if self._watch is not None and optimizer.model is not None:
                    self._watch.see_parts(optimizer.model)
            passes = self._passes = optimizer.run(controls=controls)
            plain = next(passes) is PLAIN
            _put(gradients)  # beginning a step drops the gradients from before it
            if plain:
                self._plain = gradients
                for control in controls:
                    control.first_pass_done()
            elif next(passes, None) is None:
                self._passes = None  # the gradient overflowed
            if plain or self._passes is None:
                self._idle_controls = controls
                # The second forward sees what the first saw, so that what it draws can be put back.
                for control in controls:
                    control.rewind()
            _put([(parameter, None) for parameter, _ in gradients])
            _put(kept)
            self._pending = True

    def second(self, zero_grad: bool) -> None:
        if not self._pending:
            raise ValueError('first_step() is missing: the order is backward, first_step, backward, second_step')
        with self._undone_by_errors():
            if self._passes is None:
                end_skipped(self._idle_controls, discard=self._optimizer.method.on_nonfinite == 'skip')
                zero_grad = True
            else:
                second = self._gradients('second_step()')
                if self._plain is not None:
                    _put([(parameter, None) for parameter, _ in second])
                    _put(self._plain)
                for control in self._idle_controls:
                    control.settle()
                next(self._passes, None)
            self._idle_controls = ()
            self._check_same_numbers()
        self.abandon()  # nothing is left to undo
        if zero_grad:
            self._optimizer.base_optimizer.zero_grad()

    def abandon(self) -> None:
        with InterruptsHeld():
            for control in self._idle_controls:
                control.rollback()
            if self._passes is not None:
                self._passes.close()
            self._passes, self._plain, self._idle_controls, self._late = None, None, (), None
            self._pending = False
            if self._watch is not None:
                self._watch.armed = True

    def _check_same_numbers(self) -> None:
        """Put back the random streams that the second forward drew from, and say once that it drew other numbers."""
        if self._late is None:
            return
        streams, places = self._late
        drawn = streams.moved(places)
        streams.write(places, drawn)
        if drawn and self._optimizer.model is not None and not self._told:
            self._told = True
            log.warning(
                'The second forward of a step draws other random numbers (%s) than the first, whose beginning was not '
                'seen: the model is compiled or scripted, or was not called itself. Give the optimizer the module that '
                'you call (the compiled one), or use passes() or step(closure). Reported once.',
                ', '.join(streams.names[number] for number in drawn),
            )

    @contextlib.contextmanager
    def _undone_by_errors(self) -> Generator[None]:
        """Return the context in which an error undoes the step, and an interrupt waits for the end."""
        try:
            with InterruptsHeld():
                yield
        except BaseException:
            self.abandon()
            raise

    def _gradients(self, before: str) -> list[tuple[Tensor, Tensor]]:
        pairs = [(p, p.grad) for p in self._optimizer.trainable() if p.grad is not None]
        if not pairs:
            raise ValueError(f'backward() is missing before {before}: no parameter has a gradient')
        return pairs


class _Watch:
    """A forward pre-hook that saves random streams and buffers before the first forward of a step.

    It is on the model and, until the model is called itself or a step is taken without two calls, on its parts: a hook
    makes every call of a module slower. It belongs to one optimizer: a copy or a pickle of the hook, made with its
    module, does nothing.
    """

    def __init__(self, optimizer: Stepper | None = None):
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._noted: Sequence[Control] = ()
        self._parts: list[RemovableHandle] = []
        self.armed = optimizer is not None

    def attach(self, model: nn.Module) -> None:
        """Watch a model."""
        model.register_forward_pre_hook(self)
        self.see_parts(model)

    def see_parts(self, model: nn.Module) -> None:
        """Watch the parts of a model, if they are not watched yet."""
        self._parts = self._parts or [part.register_forward_pre_hook(self) for part in _parts(model)]

    def leave_parts(self) -> None:
        """Watch the parts no longer."""
        while self._parts:
            self._parts.pop().remove()

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():  # this module is part of a graph, which has no place for the streams
            return
        optimizer = None if self._optimizer is None else self._optimizer()
        if self.armed and optimizer is not None and module.training and torch.is_grad_enabled():
            self._noted = optimizer.controls()
            self.armed = False
            if module is optimizer.model:
                self.leave_parts()

    def take(self) -> Sequence[Control]:
        noted, self._noted = self._noted, ()
        return noted

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Watch, ()


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Return the modules within a module, but for those in a compiled one: its graph has no place for hooks."""
    if is_compiled(module):
        return
    for child in module.children():
        if not isinstance(child, torch.jit.ScriptModule):
            yield child
            yield from _parts(child)


def _put(gradients: Any) -> None:
    for parameter, gradient in gradients:
        parameter.grad = gradient

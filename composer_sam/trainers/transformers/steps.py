"""The steps of one run of a Trainer: when they begin, what evaluates their passes, and what undoes them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer  # pyright: ignore[reportMissingTypeStubs]
from transformers import Trainer, TrainerCallback

from composer_sam.engine.closures import Closure
from composer_sam.engine.controls import Control
from composer_sam.engine.record import StepRecord
from composer_sam.engine.rule import PLAIN, Method, Pass
from composer_sam.engine.split_step import SplitOptimizer
from composer_sam.engine.wrappers import always_synchronises, replicas
from composer_sam.trainers.accelerate import devices_of, install
from composer_sam.trainers.batches import MicroBatches
from composer_sam.trainers.host import Length, SplitHost, TrainerMoment, logged
from composer_sam.trainers.said import say_if_nothing_was_perturbed, say_if_ranks_cannot_differ
from composer_sam.trainers.transformers.checks import not_called
from composer_sam.trainers.transformers.memory import share_memory
from composer_sam.trainers.transformers.parts import first_samples
from composer_sam.trainers.transformers.records import RecordsControl

__all__ = ['TrainerSteps']


class TrainerSteps(TrainerCallback):
    """The steps of a Trainer with a method.

    It is a callback of the Trainer while a run lasts, and the last one. So it is told when everything is prepared and
    loaded (``on_train_begin``), and when a step begins (``on_step_begin``): after the random streams were loaded, and
    before gradients are left unsynchronised for the step's first micro-batches.

    Args:
        trainer: the Trainer.
        method: the rule.
        backward: the Trainer's own ``training_step``.
        collect: the Trainer's own ``get_batch_samples``, which counts the items of micro-batches.

    Attributes:
        optimizer (SplitOptimizer | None): the wrapper of this run or the last one.
        under_way (bool): whether ``train`` is running.
        evaluating (bool): whether a pass is evaluated that is not the Trainer's own.
    """

    def __init__(self, trainer: Trainer, method: Method, backward: Callable[..., Any], collect: Callable[..., Any]):
        self.optimizer: SplitOptimizer | None = None
        self.under_way = False
        self.evaluating = False
        self._trainer: Any = trainer
        self._method = method
        self._backward = backward
        self._collect = collect
        self._host = _Host(self._moment, self._note, trainer)
        self._host.check(method)
        self._length = Length(None, None)
        self._record: StepRecord | None = None
        self._devices: frozenset[torch.device] = frozenset()
        # Of the step that is under way.
        self._window: Sequence[Any] = ()
        self._items: Any = None
        self._seen = MicroBatches(self._devices)
        self._request = PLAIN
        self._loss: Any = None
        self._place: int | None = None  # the number of micro-batches that are done; None outside of a step

    @contextlib.contextmanager
    def running(self) -> Generator[None]:
        """Return the context of one ``train()``: an exception in it leaves no trace of the step that it was in."""
        self.under_way, self.optimizer, self._record = True, None, None
        self._trainer.add_callback(self)
        try:
            yield
            self._give_up()
            say_if_nothing_was_perturbed(self._wrapper())
        except BaseException:
            self._abandon()
            raise
        finally:
            self.under_way, self._window, self._items = False, (), None
            if self in self._trainer.callback_handler.callbacks:
                self._trainer.remove_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wrap the optimizer. With auto_find_batch_size a run begins again, after the step that ran out of memory."""
        self._abandon()
        trainer, method = self._trainer, self._method
        model = trainer.model_wrapped
        self._length = _length(state, args, kwargs.get('train_dataloader'))
        self._devices = devices_of(model)
        self.optimizer = install(trainer.accelerator, self._prepared(), method, model, self._host)
        self._length.check(method)
        say_if_ranks_cannot_differ(method, model)
        if method.remembers and state.global_step and always_synchronises(model):
            share_memory(self.optimizer.base_optimizer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a step, and evaluate the passes that see a part of its micro-batches."""
        # As the Trainer does before every forward: schedule-free optimizers move the weights here.
        self._trainer.model_wrapped.train()
        self._trainer.optimizer.train()
        self._forget()
        self._request = self._wrapper().begin(self._evaluate_part)
        self._place = 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give up a step that a callback or the end of the data has cut off, before the weights are saved."""
        self._give_up()

    def expect(self, window: Sequence[Any], items: Any) -> None:
        """Keep the micro-batches of the coming step, and the number of items in them."""
        self._window, self._items = window, items

    def training_step(self, model: Any, inputs: Any, items: Any) -> Any:
        """Evaluate one micro-batch in the Trainer's own pass, and after the last one the other passes."""
        optimizer, place = self._wrapper(), self._place
        if place is None or place == len(self._window):
            raise RuntimeError(not_called(self._trainer, 'get_batch_samples and on_step_begin'))
        try:
            if place > 0:
                optimizer.resume()
            if optimizer.pass_index >= 0:
                self._seen.see(inputs)
            with self._graph_kept(self._request):
                loss = self._backward(model, inputs, items)
            self._loss = loss if self._loss is None else self._loss + loss
            self._place = place + 1
            # The Trainer does not step where the data ends in the middle of a step.
            if self._place == len(self._window) and self._trainer.accelerator.sync_gradients:
                with self._outputs_converted():
                    optimizer.finish_passes(self._loss, self._evaluate_again)
                self._forget()
            elif self._watched_between():
                optimizer.pause()
        except BaseException:
            optimizer.abandon_step()  # here, because auto_find_batch_size goes on after an error
            raise
        return loss

    def logged(self) -> dict[str, float]:
        """Return what to log of the last step."""
        return {} if self._record is None or not self.under_way else logged(self._method, self._record)

    # Private parts.

    def _prepared(self) -> Any:
        """Return the optimizer, prepared by Accelerate and without the wrapper of the run before."""
        trainer, accelerator = self._trainer, self._trainer.accelerator
        if not isinstance(trainer.optimizer, AcceleratedOptimizer):
            # Under FSDP, transformers 4 leaves it out, so that the gradients of fp16 would stay scaled.
            trainer.optimizer = accelerator.prepare(trainer.optimizer)
        optimizer = accelerator.prepare_optimizer(trainer.optimizer)  # one of a run before is made known again
        if isinstance(optimizer.optimizer, SplitOptimizer) and optimizer.optimizer.host is self._host:
            optimizer.optimizer = optimizer.optimizer.base_optimizer
        return optimizer

    def _evaluate_part(self, request: Pass) -> Any:
        """Evaluate a pass before the Trainer's own, over a part of every micro-batch."""
        parts = [first_samples(inputs, request.fraction) for inputs in self._window]
        _, items = self._collect(iter(parts), len(parts), self._trainer.args.device)
        kept = MicroBatches(self._devices)
        for inputs in parts:
            kept.expect(inputs)
        return self._evaluate(kept, items, request)

    def _evaluate_again(self, request: Pass) -> Any:
        """Evaluate a pass after the Trainer's own."""
        return self._evaluate(self._seen, self._items, request)

    def _evaluate(self, kept: MicroBatches, items: Any, request: Pass) -> Any:
        """Evaluate a pass as the Trainer evaluates its own; return the loss."""
        accelerator, model = self._trainer.accelerator, self._trainer.model_wrapped
        model.zero_grad()  # also of parameters that the optimizer does not have, which are clipped too
        synchronised = accelerator.sync_gradients
        loss: Any = None
        self.evaluating = True
        try:
            with self._graph_kept(request):
                for number, inputs in enumerate(kept.again(), start=1):
                    last = number == len(kept)
                    accelerator.sync_gradients = last
                    with contextlib.nullcontext() if last else accelerator.no_sync(model):
                        found = self._backward(model, inputs, items)
                    loss = found if loss is None else loss + found
        finally:
            accelerator.sync_gradients = synchronised
            self.evaluating = False
        return loss

    @contextlib.contextmanager
    def _outputs_converted(self) -> Generator[None]:
        """Return the context that says why outputs cannot be watched, where Accelerate returns copies of them."""
        try:
            yield
        except ValueError as error:
            precision = self._trainer.accelerator.mixed_precision
            if not self._method.watches_outputs or precision == 'no':
                raise
            raise ValueError(
                f"{type(self._method).__name__} needs the gradient at the model's outputs. With {precision}=True "
                'Accelerate returns float32 copies of them, on which a loss made inside the model does not depend: '
                'compute the loss from the outputs (compute_loss_func=...), or train without mixed precision'
            ) from error

    @contextlib.contextmanager
    def _graph_kept(self, request: Pass) -> Generator[None]:
        """Return the context in which backwards keep the gradient's graph, if the pass asks for that."""
        if not request.graph:
            yield
            return
        accelerator = self._trainer.accelerator
        own = accelerator.__dict__.get('backward')
        accelerator.backward = functools.partial(accelerator.backward, create_graph=True)
        try:
            yield
        finally:
            del accelerator.backward
            if own is not None:
                accelerator.backward = own

    def _watched_between(self) -> bool:
        """Return whether a callback is called between two micro-batches, where weights must be at w."""
        plain: Any = TrainerCallback.on_substep_end  # pyright: ignore
        called: list[Any] = [callback.on_substep_end for callback in self._trainer.callback_handler.callbacks]
        return any(getattr(function, '__func__', None) is not plain for function in called)

    def _wrapper(self) -> SplitOptimizer:
        if self.optimizer is None:
            raise RuntimeError(not_called(self._trainer, 'on_train_begin'))
        return self.optimizer

    def _forget(self) -> None:
        """Hold nothing of a step when its passes are over."""
        self._seen, self._loss, self._place = MicroBatches(self._devices), None, None

    def _abandon(self) -> None:
        """Undo the step that is under way, if any."""
        self._forget()
        if self.optimizer is not None:
            self.optimizer.abandon_step()
            ddp = replicas(self.optimizer.model)
            if ddp is not None:
                # The step was undone inside the Trainer's no_sync, which then put back what it had found.
                ddp.require_backward_grad_sync = True

    def _give_up(self) -> None:
        self._forget()
        self._wrapper().give_up()

    def _moment(self, steps_taken: int) -> TrainerMoment:
        del steps_taken  # the trainer's own counter is used: checkpoints hold it
        state = self._trainer.state
        return TrainerMoment(state.global_step, int(state.epoch or 0), self._length)

    def _note(self, method: Method, record: StepRecord) -> None:
        del method
        self._record = record


class _Host(SplitHost):
    """The Trainer as the engine's host, with the control of what it counts.

    Args:
        moment: returns the time of the next step.
        report: takes what to log of a step.
        trainer: the Trainer.
    """

    def __init__(
        self,
        moment: Callable[[int], TrainerMoment],
        report: Callable[[Method, StepRecord], None],
        trainer: Any,
    ):
        super().__init__(moment, report)
        self._trainer = trainer

    def controls(self, closure: Closure | None) -> Sequence[Control]:
        del closure
        return (RecordsControl(self._trainer, self._trainer.state),)


def _length(state: Any, args: Any, loader: Any) -> Length:
    """Return the length of a run, in steps and epochs, as far as it is known."""
    try:
        batches = len(loader)
    except TypeError:  # an iterable data set
        return Length(state.max_steps, None)
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return Length(state.max_steps, state.max_steps / per_epoch)

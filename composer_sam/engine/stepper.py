"""The code that takes one step, for a closure, a loop over passes, or two calls."""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from composer_sam.engine.attributes import AttributeControl
from composer_sam.engine.closures import Closure
from composer_sam.engine.controls import BufferControl, Control, RandomControl
from composer_sam.engine.host import Host
from composer_sam.engine.interrupts import InterruptsHeld
from composer_sam.engine.modules import Modules
from composer_sam.engine.moment import Moment
from composer_sam.engine.nonfinite import NonFinite, is_known
from composer_sam.engine.placement import Placement, alone_in_memory
from composer_sam.engine.record import StepRecord
from composer_sam.engine.rule import PLAIN, Method, Observer, Pass, PlainRule, Rule
from composer_sam.engine.scaling import refuse_scaled_losses, unscale
from composer_sam.engine.stalled import Stalled
from composer_sam.engine.step import Step
from composer_sam.engine.transaction import Transaction
from composer_sam.engine.wrappers import layout_of, replicas
from composer_sam.vectors import Layout
from composer_sam.vectors.layout import is_first_rank

__all__ = ['Stepper']

_OF_GROUPS = frozenset(('params', 'initial_lr'))  # what torch adds to a group beside the base optimizer's own keys

log = logging.getLogger(__name__)


class Stepper:
    """A base optimizer and a method, and the code that takes one step with them.

    The arguments and attributes are those of :class:`~composer_sam.SharpnessAwareOptimizer`, its only subclass.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        method: Method,
        model: nn.Module | None,
        grad_scaler: torch.amp.GradScaler | None,
        host: Host,
    ):
        self.base_optimizer = base_optimizer
        self.method = method
        self.model = model
        self.grad_scaler = grad_scaler
        self.host = host
        self.steps_taken = 0
        self.steps_perturbed = 0
        self.skipped = False
        self.observer: Observer | None = None
        self._transaction: Transaction | None = None
        self._ground: _Ground | None = None
        self._modules: Modules | None = None
        self._began: int | None = None  # the step that this object began with; not 0 after a resume
        self._nonfinite = NonFinite(method.on_nonfinite)
        self._stalled = Stalled(method)
        self._losses: list[Any] = []
        self._told = False

    @property
    def pass_index(self) -> int:
        """The number of the current pass, from 0; -1 outside a perturbed step."""
        return self._transaction.index if self._transaction is not None and self._transaction.open else -1

    def moment(self) -> Moment:
        """Return the time of the next step."""
        return self.host.moment(self.steps_taken)

    def trainable(self) -> list[Tensor]:
        """Return the parameters that a step changes, in the optimizer's order."""
        return [p for group in self.base_optimizer.param_groups for p in group['params'] if p.requires_grad]

    def controls(self, closure: Closure | None = None, layout: Layout | None = None) -> Sequence[Control]:
        """Save the state that the passes of the next step must not change, and return its controls.

        Args:
            closure: evaluates the passes; None if the caller's loop evaluates them.
            layout: the current layout, if it is known.
        """
        random = RandomControl((layout or self._current_ground().layout).devices)
        if self.model is None:
            return (random, *self.host.controls(closure))
        if self._modules is None or self._modules.model is not self.model:
            self._modules = Modules(self.model)
        modules = self._modules.all()
        return (
            *(random, BufferControl(self.model, modules), AttributeControl(modules)),
            *self.host.controls(closure),
        )

    def run(self, closure: Closure | None = None, controls: Sequence[Control] = ()) -> Generator[Pass, None, None]:
        """Yield the passes of one step; take the step after the last one, or undo it if the generator is closed before.

        Args:
            closure: evaluates the passes; None if the caller's loop evaluates them.
            controls: controls that were made before; empty to make them now.
        """
        if self._transaction is not None and self._transaction.open:
            raise ValueError('a step is already under way: its loop over passes() was neither finished nor left')
        moment = self.moment()
        self._began = moment.batch if self._began is None else self._began
        self.skipped = False
        self._nonfinite.step = moment.batch
        perturbs = self.method.perturbs(moment)
        through_method = perturbs or self.method.takes_every_step
        if not through_method and not self._nonfinite.skips:
            with self._unscaled():
                yield PLAIN
            if self._overflowed():
                self.skip()
            else:
                self.take(None, self.plain_record(moment))
            return
        if perturbs:
            self._check_model_given()
        rule = self.resolved(moment) if through_method else PlainRule()
        ground = self._current_ground()
        layout = ground.layout
        step = Step(layout, self.base_optimizer, self.model, moment.batch, rule.parameters, rule.multipliers)
        if perturbs:
            self._check_memory(step, moment)
        transaction = Transaction(rule, step, ground.placement, self._maximised())
        transaction.observer = self.observer if perturbs else None
        try:
            with transaction:
                self._transaction = transaction
                transaction.guard(controls or self.controls(closure, layout))
                yield from self._perturbed(transaction, closure)
                if not self.skipped:
                    losses = tuple(self._losses)
                    self.take(transaction, StepRecord(moment, rule if perturbs else None, losses, step.gradient_norm))
        finally:
            self._transaction = None

    def note(self, loss: Any, index: int) -> None:
        """Note the loss of a pass.

        Args:
            loss: as the closure returned it.
            index: the number of the pass, from 0.
        """
        if index == 0:
            self._losses.clear()
        value = loss.detach() if isinstance(loss, Tensor) else loss  # its graph would outlive the step
        self._losses.append(value)
        self._nonfinite.see(value, index)

    def take(self, transaction: Transaction | None, record: StepRecord) -> None:
        """Take the step: let the base optimizer step with what is in ``.grad``, and commit the transaction.

        Args:
            transaction: the step's; None for a step of the base optimizer alone.
            record: what the step did.
        """
        # A step is before or after: what belongs to the base optimizer's step is carried through with it.
        with InterruptsHeld():
            self.base_optimizer.step()
            if transaction is not None:
                transaction.commit(self.base_optimizer.param_groups)
            self._count_step(record.rule is not None)
        self.host.stepped(self.method, record)
        if record.rule is not None and self._stalled.looks and record.losses and is_known(record.losses[0]):
            self._stalled.see(float(record.losses[0]))

    def plain_record(self, moment: Moment) -> StepRecord:
        """Return the record of a step of the base optimizer alone."""
        return StepRecord(moment, None, tuple(self._losses), None)

    def skip(self) -> None:
        """End the current step without an update."""
        self.skipped = True
        if self._transaction is not None and self._transaction.open:
            self._transaction.skip(discard=self._nonfinite.skips)
            self.host.passes_done()

    def resolved(self, moment: Moment) -> Rule:
        """Return the method with its hyper-parameters as they are at one step, including the groups' own values."""
        defaults, groups = self.base_optimizer.defaults, self.base_optimizer.param_groups
        if all(group.keys() - defaults.keys() <= _OF_GROUPS for group in groups):
            return self.method.resolved(moment, ())
        own = [
            ({k: v for k, v in group.items() if k not in defaults}, sum(p.requires_grad for p in group['params']))
            for group in groups
        ]
        return self.method.resolved(moment, own)

    def check_names(self, rule: Rule) -> None:
        """Raise ValueError if the parameters that a rule names are not there."""
        Step(Layout(self.trainable()), None, self.model, 0, rule.parameters, rule.multipliers)

    def _perturbed(self, transaction: Transaction, closure: Closure | None) -> Generator[Pass, None, None]:
        """Yield the passes of a step through a rule and find the direction, or skip it where numbers are not finite."""
        for request in transaction.passes():
            with self._unscaled(), self._unsynchronised(request, closure):
                yield request
            if self._overflowed() or self._is_nonfinite(transaction, closure):
                self.skip()
                return
        transaction.write_direction()
        # Second derivatives may overflow where the gradient did not.
        if self.method.backwards_create_graph and self._is_nonfinite(transaction, closure):
            self.skip()
            return
        self.host.passes_done()
        self.host.direction_found()

    def _count_step(self, perturbed: bool) -> None:
        self.steps_taken += 1
        self.steps_perturbed += perturbed
        self._opt_called = True  # torch's LR schedulers check it, but wrap only ``step``

    def _unscaled(self) -> contextlib.AbstractContextManager[None]:
        """Return the context that refuses losses scaled for fp16, in the first step without a scaler."""
        first = self.steps_taken == 0 and self.grad_scaler is None and not self.host.steps_by_itself
        return refuse_scaled_losses() if first else contextlib.nullcontext()

    def _check_model_given(self) -> None:
        """Say once in the log what a step without a model cannot do."""
        if self.model is None and not self._told and self.method.passes > 1 and is_first_rank():
            log.warning(
                'The optimizer was made without the model, so modules with buffers (BatchNorm) count every pass of a '
                'step. Write SharpnessAwareOptimizer(base_optimizer, method, model). Reported once.'
            )
        self._told = True

    def _check_memory(self, step: Step, moment: Moment) -> None:
        """Say once that a resumed run has lost what the method remembers."""
        if not self.method.remembers or not self._began or self.steps_perturbed:
            return
        if step.memory or any(step.numbers.values()):
            return
        if is_first_rank():
            log.warning(
                '%s begins anew at step %d: what it remembers was not in the checkpoint that was loaded. That of a run '
                'without it has none; from one of shards, torch loads it with LoadPlanner (docs/plain_pytorch.md).',
                type(self.method).__name__,
                moment.batch,
            )

    def _unsynchronised(self, request: Pass, closure: Closure | None) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which a pass's gradient is not averaged over ranks, if the pass asks for that."""
        ddp = None if request.sync else replicas(self.model)
        if ddp is None:
            return contextlib.nullcontext()
        return ddp.no_sync() if closure is None else closure.unsynchronised(ddp)

    def _overflowed(self) -> bool:
        return self.grad_scaler is not None and not unscale(self.grad_scaler, self.base_optimizer)

    def _is_nonfinite(self, transaction: Transaction, closure: Closure | None) -> bool:
        """Return whether ``on_nonfinite='skip'`` must skip the step because of the loss or ``.grad``."""
        scaled = self.grad_scaler is not None or (closure is not None and closure.checks_gradients)
        if not self._nonfinite.skips or scaled:
            return False
        return self._nonfinite.found(transaction.layout.parameters, transaction.index)

    def _maximised(self) -> frozenset[int]:
        """Return the places of the trainable parameters in groups with ``maximize=True``."""
        groups = self.base_optimizer.param_groups
        if not any(group.get('maximize') for group in groups):
            return frozenset()
        kept = [bool(group.get('maximize')) for group in groups for p in group['params'] if p.requires_grad]
        return frozenset(place for place, maximised in enumerate(kept) if maximised)

    def _current_ground(self) -> _Ground:
        """Return what steps stand on, made again after parameters were added, frozen or replaced, or the model was."""
        parameters = self.trainable()
        if self._ground is None or not self._ground.holds(parameters, self.model):
            self._ground = _Ground(parameters, self.model)
        return self._ground


class _Ground:
    """What stays the same from step to step while the parameters do.

    Args:
        parameters: the trainable parameters, in the optimizer's order.
        model: the module they belong to.
    """

    def __init__(self, parameters: list[Tensor], model: nn.Module | None):
        self.layout = layout_of(parameters, model)
        self.placement = Placement(self.layout, alone_in_memory(parameters, model))
        self._model = model
        self._kinds = [p.dtype for p in parameters], [p.device for p in parameters]

    def holds(self, parameters: list[Tensor], model: nn.Module | None) -> bool:
        """Return whether the parameters and the model are still those of this object."""
        known = self.layout.parameters
        return (
            model is self._model
            and len(parameters) == len(known)
            and all(map(operator.is_, parameters, known))
            and ([p.dtype for p in parameters], [p.device for p in parameters]) == self._kinds
        )

"""The steps of one fit: Lightning evaluates one pass of each, and the others are evaluated here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any

from torch import Tensor, nn

from composer_sam.engine.pass_number import PassNumber
from composer_sam.engine.record import StepRecord
from composer_sam.engine.rule import PLAIN, Method, Pass
from composer_sam.engine.split_step import SplitOptimizer
from composer_sam.trainers.batches import MicroBatches
from composer_sam.trainers.host import Length, SplitHost, TrainerMoment, logged
from composer_sam.trainers.lightning.checks import check_fraction
from composer_sam.trainers.lightning.package import Metric, pl
from composer_sam.trainers.said import say_if_ranks_cannot_differ

__all__ = ['Passes']


class Passes:
    """The steps of one fit.

    It stands in for three methods of the strategy: the two that evaluate a micro-batch, and the one that steps.

    Args:
        method: the rule.
        trainer: the Trainer, which has set its data up.
        module: the LightningModule.

    Attributes:
        optimizer (SplitOptimizer): the wrapper around the module's optimizer.
    """

    def __init__(self, method: Method, trainer: Any, module: Any):
        strategy: Any = trainer.strategy
        self._trainer, self._strategy, self._module = trainer, strategy, module
        self._length = _length(trainer)
        self._length.check(method)
        self._base = strategy.optimizers[0]
        self._model: nn.Module = strategy.model
        scaler = getattr(strategy.precision_plugin, 'scaler', None)
        self.optimizer = SplitOptimizer(
            self._base, method, self._model, scaler, host=SplitHost(self._moment, self._log)
        )
        say_if_ranks_cannot_differ(method, self._model)
        self._devices = frozenset(parameter.device for parameter in self.optimizer.trainable())
        self._metrics = [part for part in self._model.modules() if isinstance(part, Metric)]
        # Lightning's own methods.
        self._forward: Callable[..., Any] = strategy.training_step
        self._backward: Callable[..., Any] = strategy.backward
        self._step: Callable[..., Any] = strategy.optimizer_step
        # The step that is under way.
        self._request: Pass | None = None
        self._seen = MicroBatches(self._devices)
        self._losses: list[Tensor] = []
        self._is_last = False  # whether the micro-batch is the step's last

    @contextlib.contextmanager
    def attached(self) -> Generator[None]:
        """Return the context in which Lightning's steps are the method's."""
        strategy, model = self._strategy, self._model
        replaced = [
            (strategy, 'training_step', self._training_step),
            (strategy, 'backward', self._first_backward),
            (strategy, 'optimizer_step', self._optimizer_step),
        ]
        if self.optimizer.method.watches_outputs and model is not self._module:
            replaced += [(one, 'register_forward_hook', self._watch_calls) for one in (model, self._module)]
        with _replaced(*replaced):
            strategy.optimizers = [self.optimizer]
            try:
                yield
            finally:
                strategy.optimizers = [self._base]

    # What Lightning calls in place of the strategy's methods.

    def _training_step(self, *args: Any) -> Any:
        trainer = self._trainer
        if _only_updates_statistics(trainer):
            return self._forward(*args)
        # Lightning zeroes the gradients by the same rule: what came before was left without a step.
        if self._request is None or trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0:
            self._begin(args)
        else:
            self._go_on(args)
        output = self._forward(*args)
        if output is None:  # no backward follows
            self._micro_batch_done()
        return output

    def _first_backward(self, loss: Tensor, optimizer: Any, *args: Any, **options: Any) -> Any:
        if self._request is not None and self._request.graph:
            options['create_graph'] = True
        result = self._backward(loss, optimizer, *args, **options)
        self._losses.append(loss.detach())
        self._micro_batch_done()
        return result

    def _optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **options: Any) -> Any:
        if _only_updates_statistics(self._trainer):
            return closure()  # Lightning steps on an epoch's last batch, here with the gradient of the step before

        # Lightning evaluates micro-batches that only accumulate outside of the strategy's step, and the last one in it.
        def all_passes() -> Any:
            self._is_last = True
            try:
                result = closure()
            finally:
                self._is_last = False
            self._finish()
            return result

        return self._step(optimizer, all_passes, *args, **options)

    # The passes.

    def _begin(self, args: tuple[Any, ...]) -> None:
        self._seen, self._losses, self._request = MicroBatches(self._devices), [], None

        def evaluate_part(request: Pass) -> Tensor | None:
            check_fraction(self.optimizer.method, self._trainer)  # the number of micro-batches may follow the epoch
            self._seen.see(args)
            return self._evaluate(request)

        request = self.optimizer.begin(evaluate_part)
        if request is not PLAIN and not len(self._seen):
            self._seen.see(args)
        if self.optimizer.pass_index >= 0:
            self._give_metrics_copies()
        self._request = request

    def _go_on(self, args: tuple[Any, ...]) -> None:
        request = self._request
        self.optimizer.resume()
        if request is not PLAIN:
            self._seen.see(args)

    def _micro_batch_done(self) -> None:
        # Between micro-batches Lightning may validate and save.
        if not self._is_last:
            self.optimizer.pause()

    def _finish(self) -> None:
        if self._request is None:
            return  # no micro-batch was evaluated
        self._request = None
        self.optimizer.finish_passes(_total(self._losses), self._evaluate)
        self._seen = MicroBatches(self._devices)

    def _evaluate(self, request: Pass) -> Tensor | None:
        """Evaluate a pass over all micro-batches as Lightning does; return its loss, None if no micro-batch had one."""
        no_sync: Any = getattr(self._strategy, 'block_backward_sync', contextlib.nullcontext)
        options = {'create_graph': True} if request.graph else {}
        losses: list[Tensor] = []
        self._give_metrics_copies()
        with self._unrecorded():
            for place, (batch, *others) in enumerate(self._seen.again(), start=1):
                with contextlib.nullcontext() if place == len(self._seen) else no_sync():
                    output = self._forward(PassNumber(0, request.fraction).part(batch), *others)
                    found: Any = output['loss'] if isinstance(output, Mapping) else output
                    if found is not None:
                        loss = found / self._trainer.accumulate_grad_batches
                        self._backward(loss, self.optimizer, **options)
                        losses.append(loss.detach())
        return _total(losses)

    # What the passes of a step must not do twice, or to each other.

    def _unrecorded(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which nothing is logged."""
        those_that_log = (self._module, *self._trainer.callbacks, *self._trainer.loggers)
        names = ('log', 'log_dict', 'log_metrics')
        return _replaced(*((one, name, _nothing) for one in those_that_log for name in names if hasattr(one, name)))

    def _give_metrics_copies(self) -> None:
        """Give metrics copies of their states, because some add to them in place; the engine puts the states back."""
        copies: dict[int, Tensor] = {}  # the metrics of a collection share states
        for metric in self._metrics:
            for name, state in metric.metric_state.items():
                if isinstance(state, Tensor):
                    setattr(metric, name, copies.setdefault(id(state), state.clone()))

    def _watch_calls(self, hook: Callable[..., Any]) -> _Handles:
        """Register a forward hook for the calls that ``training_step`` makes of the module.

        Under DDP and FSDP1, Lightning runs ``training_step`` inside of a call of the module, whose output is the loss.
        """
        depth = 0

        def before(*_: Any) -> None:
            nonlocal depth
            depth += 1

        def after(module: nn.Module, inputs: Any, output: Any) -> Any:
            nonlocal depth
            depth -= 1
            return hook(module, inputs, output) if depth else None

        module: nn.Module = self._module
        return _Handles([module.register_forward_pre_hook(before), nn.Module.register_forward_hook(module, after)])

    # What the host is asked for.

    def _moment(self, steps_taken: int) -> TrainerMoment:
        del steps_taken  # the trainer's own counters are used: checkpoints hold them
        return TrainerMoment(self._trainer.global_step, self._trainer.current_epoch, self._length)

    def _log(self, method: Method, record: StepRecord) -> None:
        trainer, step = self._trainer, record.moment.batch
        every = trainer.log_every_n_steps
        if not trainer.loggers or not trainer.is_global_zero or not every or (step + 1) % every:
            return
        numbers = logged(method, record)
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)


class _Handles:
    """The handles of several hooks, removed together."""

    def __init__(self, handles: list[Any]):
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _length(trainer: Any) -> Length:
    """Return the length of a run whose data is set up."""
    scheduled = any(isinstance(callback, pl.callbacks.GradientAccumulationScheduler) for callback in trainer.callbacks)
    # With a scheduler the epochs have different numbers of steps.
    steps = trainer.max_steps if scheduled else trainer.estimated_stepping_batches
    epochs = trainer.max_epochs
    is_known = 0 < steps < float('inf')
    return Length(int(steps) if is_known else None, epochs if epochs is not None and epochs > 0 else None)


def _only_updates_statistics(trainer: Any) -> bool:
    """Return whether this is the epoch that StochasticWeightAveraging adds for BatchNorm: it has no backward."""
    averaging = (one for one in trainer.callbacks if isinstance(one, pl.callbacks.StochasticWeightAveraging))
    return any(trainer.current_epoch > callback.swa_end for callback in averaging)


def _total(losses: list[Tensor]) -> Tensor | None:
    """Return the sum of the micro-batches' losses; None if there is none."""
    total: Any = sum(losses)
    return total if losses else None


@contextlib.contextmanager
def _replaced(*replacements: tuple[Any, str, Any]) -> Generator[None]:
    """Give objects other methods, by object, name and method, for the time of a context."""
    with contextlib.ExitStack() as undo:
        for one, name, method in replacements:
            own = vars(one)
            if name in own:
                undo.callback(own.__setitem__, name, own[name])
            else:
                undo.callback(own.pop, name, None)
            own[name] = method
        yield


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing, in place of a method that logs."""

"""Hugging Face Accelerate: a loop over the batches of one step that gives each of them once per pass."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from composer_sam.engine.pass_number import PassNumber
from composer_sam.engine.rule import Method
from composer_sam.engine.split_step import SplitOptimizer
from composer_sam.extras import extra
from composer_sam.trainers.batches import MicroBatches
from composer_sam.trainers.host import Length, SplitHost, TrainerMoment

with extra('accelerate', __name__):
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType

__all__ = ['SharpnessAwareSteps', 'StepBatches', 'devices_of', 'install']

_UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


class SharpnessAwareSteps:
    r"""The steps of a loop with Accelerate, each a loop over its micro-batches, once for every pass.

    .. code-block:: python

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        steps = SharpnessAwareSteps(accelerator, SAM(rho=0.05), model, optimizer)
        for step in steps(loader):
            for batch in step:                                     # every micro-batch, in every pass
                accelerator.backward(loss_of(model, batch))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)   # of the direction
            optimizer.step()
            optimizer.zero_grad()

    The inner loop takes the place of ``accelerator.accumulate(model)``: a step has ``gradient_accumulation_steps``
    micro-batches, fewer at the end of the loader, and gradients are averaged over ranks after the last one only. When
    it ends, the direction is in ``.grad``. Everything after it is as ever: ``clip_grad_norm_``, ``optimizer.step()``,
    ``scheduler.step()``; with ``mixed_precision='fp16'`` Accelerate's scaler skips a step if any of its passes
    overflowed. Do not zero gradients in the inner loop.

    Args:
        accelerator: the Accelerator.
        method: the rule, for example ``SAM(rho=0.05)``.
        model: the model, as ``accelerator.prepare`` returned it.
        optimizer: the optimizer, as ``accelerator.prepare`` returned it. From now on its ``step`` is the method's.
        total_steps: number of optimizer steps of the run, for ``start`` and ``end`` as parts of it (``'0.8dur'``) and
            methods that follow the length of the run. None: only bounds in steps (``'500ba'``).

    Attributes:
        optimizer (SplitOptimizer): the wrapper, with its counters ``steps_taken`` and ``steps_perturbed``.

    Cost:
        The method's passes. A copy of every micro-batch of the step, so that what a model changes in its batch in place
        is not changed twice.

    Raises:
        TypeError: the optimizer was not prepared.
        ValueError: the optimizer is wrapped already; the Accelerator uses DeepSpeed, Megatron-LM or XLA, whose engines
            take the step themselves; what :class:`~composer_sam.SharpnessAwareOptimizer` raises; and at
            ``optimizer.step()`` without the inner loop.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from composer_sam import SAM
        >>> from composer_sam.trainers.accelerate import SharpnessAwareSteps
        >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=2)
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        >>> steps = SharpnessAwareSteps(accelerator, SAM(rho=0.05), model, optimizer)
        >>> for step in steps(loader):
        ...     for batch in step:
        ...         accelerator.backward(model(batch).square().mean())
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> steps.optimizer.steps_taken
        2

    To resume a run, ``accelerator.register_for_checkpointing(steps)`` before ``save_state`` and ``load_state``: the
    number of steps taken then goes with the checkpoint, and ``interval`` keeps its phase.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        method: Method,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        *,
        total_steps: int | None = None,
    ):
        self._accelerator = accelerator
        self._model = model
        length = Length(total_steps, None)
        units = ('ba',) if total_steps is None else ('ba', 'dur')
        host = SplitHost(lambda taken: TrainerMoment(taken, 0, length), units=units)
        self.optimizer = install(accelerator, optimizer, method, model, host)
        if total_steps is not None:
            length.check(method)

    def __call__(self, loader: Iterable[Any]) -> Generator[StepBatches]:
        """Yield the steps of one epoch.

        Args:
            loader: the loader that ``accelerator.prepare`` returned, or any iterable of micro-batches.
        """
        window: list[Any] = []
        for batch in loader:
            window.append(batch)
            if len(window) == self._accelerator.gradient_accumulation_steps:
                yield from self._step(window)
                window = []
        if window:
            yield from self._step(window)

    def state_dict(self) -> dict[str, int]:
        """Return what a checkpoint needs besides the optimizer's state."""
        return {'steps_taken': self.optimizer.steps_taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.optimizer.steps_taken = state['steps_taken']

    def _step(self, window: list[Any]) -> Iterator[StepBatches]:
        try:
            yield StepBatches(self._accelerator, self.optimizer, self._model, window)
        except BaseException:  # the caller's loop was left, or failed
            self.optimizer.abandon_step()
            raise


class StepBatches:
    """The micro-batches of one step. Iterating over it yields each of them once per pass, at that pass's weights.

    Leaving the loop early, or an exception inside it, undoes the step.

    Attributes:
        batches (list): the micro-batches, for what must be known of all of them, such as their number of tokens.
        counts (bool): whether the pass that is under way is the one whose loss and metrics count: the first one over
            whole micro-batches. Its loss is at w, but for ``ascent_fraction`` and methods whose only pass is perturbed.
    """

    def __init__(self, accelerator: Accelerator, optimizer: SplitOptimizer, model: nn.Module, batches: list[Any]):
        self._accelerator = accelerator
        self._optimizer = optimizer
        self._model = model
        self.batches = batches
        self.counts = False

    def __iter__(self) -> Iterator[Any]:
        kept = MicroBatches(devices_of(self._model))
        for batch in self.batches:
            kept.expect(batch)
        try:
            with contextlib.closing(self._optimizer.requests()) as requests:
                for index, request in enumerate(requests):
                    self.counts = request.counts
                    number = PassNumber(index, request.fraction)
                    for place, batch in enumerate(kept.again(), start=1):
                        last = place == len(kept)
                        self._accelerator.sync_gradients = last
                        with contextlib.nullcontext() if last else self._accelerator.no_sync(self._model):
                            yield number.part(batch)
        finally:
            self.counts = False
            self._accelerator.sync_gradients = True


def devices_of(model: nn.Module) -> frozenset[torch.device]:
    """Return the devices that a model's parameters are on."""
    return frozenset(parameter.device for parameter in model.parameters())


def install(
    accelerator: Accelerator, optimizer: Any, method: Method, model: nn.Module, host: SplitHost
) -> SplitOptimizer:
    """Put the wrapper between Accelerate's optimizer and the one it was made of; return the wrapper.

    Raises:
        TypeError: ``optimizer`` is not one that ``accelerator.prepare`` returned.
        ValueError: the Accelerator's engine takes the step itself.
    """
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise TypeError(
            f'optimizer must be what accelerator.prepare(model, optimizer, ...) returned, got a '
            f'{type(optimizer).__name__}'
        )
    kind = accelerator.distributed_type
    if kind in _UNSUPPORTED:
        raise ValueError(
            f'{kind.value} takes the step itself, at its own weights: use DistributedDataParallel or FSDP, which '
            'Accelerate offers too'
        )
    scaler: Any = accelerator.scaler
    wrapped = SplitOptimizer(optimizer.optimizer, method, model, scaler, host=host)
    # In place: schedulers and the accelerator hold this object. Its constructor also notes the step method.
    optimizer.__init__(wrapped, device_placement=False, scaler=optimizer.scaler)
    return wrapped

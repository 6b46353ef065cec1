"""The actions of a method at Composer's events: the optimizer swap, the scaler, and the check of the run's length."""

from __future__ import annotations

from typing import Any

from composer.algorithms.sam import SAMOptimizer
from composer.core import Algorithm, Event, Precision, State, TimeUnit
from composer.loggers import Logger

from composer_sam.engine.optimizer import SharpnessAwareOptimizer
from composer_sam.engine.rule import Method
from composer_sam.trainers.composer.host import ComposerHost
from composer_sam.trainers.composer.memory import expect_memory
from composer_sam.trainers.composer.scaler import GradScaler
from composer_sam.trainers.said import say_if_nothing_was_perturbed, say_if_ranks_cannot_differ

__all__ = ['apply', 'register']


def register(algorithm: type[Any]) -> None:
    """Register a class, so that ``isinstance`` takes it and its subclasses for an ``Algorithm``."""
    Algorithm.register(algorithm)


def apply(method: Method, event: Event, state: State, logger: Logger) -> None:
    """Do what a method does at an event of the Trainer."""
    if event == Event.FIT_END:
        optimizer = state.optimizers[0]
        if isinstance(optimizer, SharpnessAwareOptimizer):
            say_if_nothing_was_perturbed(optimizer)
        return
    _install_scaler(method, state)
    if event == Event.BEFORE_LOAD:
        expect_memory(method, state)
    if event == Event.FIT_START:
        _swap(method, state, logger)


def _swap(method: Method, state: State, logger: Logger) -> None:
    """Replace the trainer's optimizer with the wrapper, once even over several fits."""
    name = type(method).__name__
    if not state.optimizers:
        raise ValueError(f'{name} needs an optimizer: give the Trainer optimizers=...')
    length = state.max_duration
    unit = None if length is None else 1 / length.value
    method.check_run(str(length), unit, lambda value, unit: _part(state, value, TimeUnit(unit)))
    optimizer = state.optimizers[0]
    if isinstance(optimizer, SharpnessAwareOptimizer) and optimizer.method is method:
        optimizer.model = state.model
        return
    if isinstance(optimizer, SAMOptimizer):
        raise ValueError(f'composer.algorithms.SAM has wrapped the optimizer already: use it or {name}, not both')
    say_if_ranks_cannot_differ(method, state.model)
    state.optimizers = SharpnessAwareOptimizer(optimizer, method, state.model, host=ComposerHost(state, logger))


def _install_scaler(method: Method, state: State) -> None:
    """Install a scaler for steps of several passes at amp_fp16; ``fit(precision=...)`` replaces it every time."""
    if state.precision != Precision.AMP_FP16 or isinstance(state.scaler, GradScaler):
        return
    if method.backwards_create_graph:
        raise ValueError(
            f"precision='amp_fp16' is not supported by {type(method).__name__}: second derivatives of a scaled loss "
            "overflow unnoticed. Use precision='amp_bf16' or 'fp32'"
        )
    scaler = GradScaler(state.device.name if state.device.name == 'cpu' else 'cuda')
    if state.scaler is not None and state.scaler.is_enabled():
        scaler.load_state_dict(state.scaler.state_dict())
    state.scaler = scaler


def _part(state: State, value: float, unit: TimeUnit) -> float | None:
    """Return the part of the run that ``value`` units make up; None if it is unknown."""
    length = state.max_duration
    if length is None:
        return None
    if unit == TimeUnit.DURATION:
        return value
    if unit != length.unit:
        # The number of steps per epoch converts epochs to steps and back.
        steps = {TimeUnit.EPOCH: state.dataloader_len, TimeUnit.BATCH: 1}
        of, by = steps.get(length.unit), steps.get(unit)
        if of is None or by is None:
            return None
        value = value * int(by) / int(of)
    return value / length.value

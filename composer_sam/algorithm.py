"""The Composer algorithm every method extends: hyper-parameters, the steps to perturb, and the optimizer swap."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from composer.core import Algorithm, Event, Precision, State, Time, Timestamp, TimeUnit
from composer.loggers import Logger

from composer_sam.controls import TrainerControl
from composer_sam.step import Passes, Step, count_passes
from composer_sam.vectors import PerParameter

__all__ = ['Moment', 'SharpnessAware', 'hyperparameter']


def hyperparameter(
    default: Any,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
) -> Any:
    """Declare a method's numeric hyper-parameter: its default and its open (gt, lt) or closed (ge) range."""
    return dataclasses.field(default=default, metadata={'range': (gt, ge, lt)})


@dataclass(frozen=True)
class Moment:
    """When a step happens: ``batch`` is the number of steps before it; the rest is known under a Trainer only."""

    batch: int
    timestamp: Timestamp | None = None
    max_duration: Time | None = None


@dataclass(eq=False, kw_only=True)
class SharpnessAware(Algorithm):
    """What all methods share. A method is a dataclass that extends it, declares its hyper-parameters and writes its
    update rule in :meth:`direction`.

    Args:
        interval: perturb at steps ``interval``, ``2 * interval``, ...; the others are plain base steps. Under a Trainer
            the phase comes from the trainer's batch counter, so it survives a resume.
        start: first moment at which steps may be perturbed, a Composer time string (``'0.8dur'``, ``'10ep'``,
            ``'500ba'``); before it plain base steps at the base step's cost. None: from the beginning.
        end: first moment at which steps are no longer perturbed. None: to the last step.
        sync_first_pass: average the first pass's gradient over ranks, so that all ranks perturb alike; by default each
            rank perturbs by its own gradient (m-sharpness) and saves the communication.
    """

    interval: int = 1
    start: str | Time | None = None
    end: str | Time | None = None
    sync_first_pass: bool = False

    paper: ClassVar[str] = ''
    extra_copies: ClassVar[int] = 1

    def direction(self, step: Step) -> Passes:
        """The update rule: yields a :class:`Pass` and is sent its gradient, any number of times; returns a
        :class:`Direction`. It sees vectors only, never parameters, gradients or the base optimizer."""
        raise NotImplementedError(f'{type(self).__name__} must define direction(step)')

    @property
    def passes(self) -> int:
        """Forward-backward passes of a perturbing step, counted on the rule itself."""
        return count_passes(self.direction)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if 'range' in field.metadata:
                _check_range(field.name, getattr(self, field.name), *field.metadata['range'])
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f'interval must be an integer >= 1, got {self.interval!r}')
        if not isinstance(self.sync_first_pass, bool):
            raise ValueError(f'sync_first_pass must be true or false, got {self.sync_first_pass!r}')
        self._start = _time('start', self.start)
        self._end = _time('end', self.end)
        if _empty(self._start, self._end):
            raise ValueError(f'start must lie before end, got start={self.start!r} and end={self.end!r}')

    # Which steps are perturbed, and with which values.

    def perturbs(self, moment: Moment) -> bool:
        """Whether the step at ``moment`` is perturbed."""
        if (moment.batch + 1) % self.interval:
            return False
        started = self._start is None or _reached(self._start, moment)
        return started and (self._end is None or not _reached(self._end, moment))

    def resolved(self, moment: Moment, groups: Sequence[tuple[dict[str, Any], int]]) -> SharpnessAware:
        """This method with every hyper-parameter as it is at one step.

        Args:
            moment: when the step happens.
            groups: for each parameter group the values it sets for itself and its number of trainable parameters.
        """
        del moment
        own = {}
        for field in dataclasses.fields(self):
            if 'range' not in field.metadata or not any(field.name in values for values, _ in groups):
                continue
            default = getattr(self, field.name)
            per_group = [(values.get(field.name, default), count) for values, count in groups]
            for value, _ in per_group:
                _check_range(f'{field.name} of a parameter group', value, *field.metadata['range'])
            own[field.name] = PerParameter(value for value, count in per_group for _ in range(count))
        if not own:
            return self
        method = copy.copy(self)
        for name, values in own.items():
            setattr(method, name, values)
        return method

    def check_without_trainer(self) -> None:
        """Raise ValueError where ``start`` or ``end`` can only be told by a Trainer."""
        for name, time in (('start', self._start), ('end', self._end)):
            if time is not None and time.unit != TimeUnit.BATCH:
                raise ValueError(
                    f'{name}={getattr(self, name)!r} needs a Trainer to tell the time: '
                    f"without one give {name} in steps, for example '500ba'"
                )

    def _check_window(self, max_duration: Time | None) -> None:
        """Raise ValueError for a window that the run's length shows to be empty, before training starts."""
        ends = {'start': self._start, 'end': self._end}
        for name, time in ends.items():
            if time is not None and time.unit == TimeUnit.DURATION and max_duration is None:
                raise ValueError(f'{name}={getattr(self, name)!r} needs max_duration')
            if time is not None and max_duration is not None and time.unit == max_duration.unit:
                # Compared as parts of the run: of it alone Composer allows fractions.
                ends[name] = Time(time.value / max_duration.value, TimeUnit.DURATION)
        start, end = ends.values()
        if _empty(start, end):
            raise ValueError(
                f'start must lie before end, got start={self.start!r} and end={self.end!r} in a run of {max_duration}'
            )

    # Composer's side.

    def match(self, event: Event, state: State) -> bool:
        del state
        return event == Event.FIT_START

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Swap the trainer's optimizer for the wrapper around it, once, also over several fits."""
        del event, logger
        from composer_sam.optimizer import SharpnessAwareOptimizer

        if state.precision == Precision.AMP_FP16:
            raise ValueError(
                f"precision='amp_fp16' is not supported by {type(self).__name__}: every pass needs its own gradient "
                "scaling. Use precision='amp_bf16' or 'fp32'"
            )
        if not state.optimizers:
            raise ValueError(f'{type(self).__name__} needs an optimizer: give the Trainer optimizers=...')
        self._check_window(state.max_duration)
        optimizer = state.optimizers[0]
        if isinstance(optimizer, SharpnessAwareOptimizer) and optimizer.method is self:
            optimizer.model = state.model
            return
        state.optimizers = SharpnessAwareOptimizer(optimizer, self, state.model, TrainerLink(state))


class TrainerLink:
    """What a wrapped optimizer asks its trainer: the time of a step, and control of the trainer's records."""

    def __init__(self, state: State):
        self._state = state

    def moment(self) -> Moment:
        timestamp = self._state.timestamp
        return Moment(timestamp.batch.value, timestamp, self._state.max_duration)

    def control(self, closure: Callable[..., Any]) -> TrainerControl:
        return TrainerControl(self._state, closure)


def _check_range(name: str, value: Any, gt: float | None, ge: float | None, lt: float | None) -> None:
    bounds = [f'{sign} {bound:g}' for sign, bound in (('>', gt), ('>=', ge), ('<', lt)) if bound is not None]
    number = isinstance(value, Real) and not isinstance(value, bool)
    if (
        not number
        or not math.isfinite(value)
        or (gt is not None and value <= gt)
        or (ge is not None and value < ge)
        or (lt is not None and value >= lt)
    ):
        raise ValueError(f'{name} must be a finite number {" and ".join(bounds)}, got {value!r}')


def _time(name: str, value: str | Time | None) -> Time | None:
    if value is None:
        return None
    try:
        time = Time.from_input(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be a Composer time such as '0.8dur', '10ep' or '500ba', got {value!r}"
        ) from error
    if time.unit == TimeUnit.SECOND:
        raise ValueError(f'{name} must not be in seconds, which differ between ranks and runs, got {value!r}')
    if time.value < 0:
        raise ValueError(f'{name} must not be negative, got {value!r}')
    return time


def _empty(start: Time | None, end: Time | None) -> bool:
    return start is not None and end is not None and start.unit == end.unit and start.value >= end.value


def _reached(time: Time, moment: Moment) -> bool:
    if moment.timestamp is None:
        return moment.batch >= time.value
    if time.unit != TimeUnit.DURATION:
        return moment.timestamp.get(time.unit) >= time
    if moment.max_duration is None:
        raise ValueError(f'{time.to_timestring()} needs max_duration')
    elapsed = moment.timestamp.get(moment.max_duration.unit).value
    return elapsed / moment.max_duration.value >= time.value

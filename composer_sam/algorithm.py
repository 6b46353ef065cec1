"""The Composer algorithm every method extends: hyper-parameters, the steps to perturb, and the optimizer swap."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from composer.algorithms import GradientClipping
from composer.algorithms.sam import SAMOptimizer
from composer.callbacks import MemoryMonitor
from composer.core import Algorithm, Event, Precision, State, Time, Timestamp, TimeUnit
from composer.distributed import DDPSyncStrategy
from composer.loggers import Logger
from composer.optim import ComposerScheduler

from composer_sam.controls import TrainerControl, closure_cell
from composer_sam.counting import count
from composer_sam.distributed import always_synchronises
from composer_sam.grad_scaler import GradScaler
from composer_sam.selection import Selection, check_selection
from composer_sam.step import Passes, Step
from composer_sam.vectors import PerParameter, each

__all__ = ['Moment', 'SharpnessAware', 'choice', 'hyperparameter']

log = logging.getLogger(__name__)


def hyperparameter(
    default: Any,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    per_group: bool = True,
) -> Any:
    """Declare a method's numeric hyper-parameter.

    Args:
        default: its default; None means that None is allowed.
        gt: exclusive lower bound.
        ge: inclusive lower bound.
        lt: exclusive upper bound.
        per_group: whether parameter groups may set it for themselves.
    """
    return dataclasses.field(default=default, metadata={'range': (gt, ge, lt), 'per_group': per_group})


def choice(default: str, *others: str) -> Any:
    """Declare a hyper-parameter that is one of a few words."""
    return dataclasses.field(default=default, metadata={'choices': (default, *others)})


@dataclass(frozen=True)
class Moment:
    """When a step happens: ``batch`` is the number of steps before it; ``state`` is there under a Trainer only."""

    batch: int
    state: State | None = None


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
        parameters: which parameters are perturbed: a regular expression searched for in their names, the word
            ``'normalization'`` for those of normalisation layers, or a predicate of name and parameter. The others get
            the direction but no offset, and do not count in the radius. None: all.
        schedules: factors by which hyper-parameters are multiplied over time, by name: a Composer scheduler
            (``{'rho': CosineAnnealingScheduler()}``; needs a Trainer) or a callable of the timestamp. A factor of 0
            is allowed: the radius may start or end there.
        on_nonfinite: what a step does about a loss or a gradient that is not finite, in any pass. ``'propagate'``: what
            the base optimizer alone does, which is to step with it; the first such loss is reported in the log.
            ``'skip'``: the step is skipped on all ranks, perturbed or not; weights, optimizer state and buffers stay as
            they were, only the random streams go on. It costs a read of the gradient, a reduction of one number over
            the ranks and a wait for the device per pass.
    """

    interval: int = 1
    start: str | Time | None = None
    end: str | Time | None = None
    sync_first_pass: bool = False
    parameters: Selection | None = None
    schedules: Mapping[str, Callable[..., float]] | None = None
    on_nonfinite: str = choice('propagate', 'skip')

    paper: ClassVar[str] = ''
    extra_copies: ClassVar[int] = 1

    def direction(self, step: Step) -> Passes:
        """The update rule: yields a :class:`Pass` and is sent its gradient, any number of times; returns a
        :class:`Direction`. It sees vectors only, never parameters, gradients or the base optimizer."""
        raise NotImplementedError(f'{type(self).__name__} must define direction(step)')

    @functools.cached_property
    def passes(self) -> int:
        """Forward-backward passes of a perturbing step, counted on the rule itself."""
        return count(self).passes

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_field(field, getattr(self, field.name))
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f'interval must be an integer >= 1, got {self.interval!r}')
        check_selection(self.parameters)
        self._check_schedules()
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
        own: dict[str, Any] = {}
        for field in self._numeric():
            name = field.name
            if any(name in values for values, _ in groups):
                if not field.metadata['per_group']:
                    raise ValueError(f'{name} cannot differ between parameter groups in {type(self).__name__}')
                per_group = [(values.get(name, getattr(self, name)), count) for values, count in groups]
                for value, _ in per_group:
                    _check_range(f'{name} of a parameter group', value, *field.metadata['range'])
                own[name] = PerParameter(value for value, count in per_group for _ in range(count))
        for name, schedule in (self.schedules or {}).items():
            factor = _factor(name, schedule, moment)
            own[name] = each(lambda value, factor=factor: factor * value, own.get(name, getattr(self, name)))
        if not own:
            return self
        method = copy.copy(self)
        for name, value in own.items():
            setattr(method, name, value)
        return method

    @classmethod
    def _numeric(cls) -> list[dataclasses.Field]:
        return [field for field in dataclasses.fields(cls) if 'range' in field.metadata]

    def _check_schedules(self) -> None:
        names = [field.name for field in self._numeric() if getattr(self, field.name) is not None]
        for name, schedule in (self.schedules or {}).items():
            if name not in names:
                raise ValueError(
                    f'schedules has no hyper-parameter {name!r} to follow: {type(self).__name__} has {", ".join(names)}'
                )
            if not callable(schedule):
                raise ValueError(
                    f'schedules[{name!r}] must be a Composer scheduler or a callable of the timestamp, got {schedule!r}'
                )

    def check_without_trainer(self) -> None:
        """Raise ValueError where ``start``, ``end`` or a schedule can only be told by a Trainer."""
        for name, schedule in (self.schedules or {}).items():
            if _is_composer_scheduler(schedule):
                raise ValueError(
                    f'schedules[{name!r}] is a Composer scheduler, which needs a Trainer: '
                    'without one give a callable of the timestamp'
                )
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
        # The scaler must be there before a checkpoint's scale is loaded; the optimizer is swapped after it.
        return event in (Event.BEFORE_LOAD, Event.FIT_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Swap the trainer's optimizer for the wrapper around it, once, also over several fits."""
        from composer_sam.optimizer import SharpnessAwareOptimizer

        self._install_scaler(state)
        if event == Event.BEFORE_LOAD:
            return
        if not state.optimizers:
            raise ValueError(f'{type(self).__name__} needs an optimizer: give the Trainer optimizers=...')
        self._check_window(state.max_duration)
        optimizer = state.optimizers[0]
        if isinstance(optimizer, SharpnessAwareOptimizer) and optimizer.method is self:
            optimizer.model = state.model
            return
        if isinstance(optimizer, SAMOptimizer):
            raise ValueError(
                f'composer.algorithms.SAM has wrapped the optimizer already: use it or {type(self).__name__}, not both'
            )
        if always_synchronises(state.model) and not self.sync_first_pass and self.passes > 1:
            log.warning(
                'FSDP averages every gradient over the ranks, so all ranks of %s perturb alike: sync_first_pass=False, '
                'one perturbation per rank (m-sharpness), has no effect',
                type(self).__name__,
            )
        state.optimizers = SharpnessAwareOptimizer(optimizer, self, state.model, trainer=TrainerLink(state, logger))

    def _install_scaler(self, state: State) -> None:
        """At amp_fp16 put a scaler in place that knows of passes; ``fit(precision=...)`` replaces it every time."""
        if state.precision != Precision.AMP_FP16 or isinstance(state.scaler, GradScaler):
            return
        if self.backwards_create_graph:
            raise ValueError(
                f"precision='amp_fp16' is not supported by {type(self).__name__}: second derivatives of a scaled loss "
                "overflow unnoticed. Use precision='amp_bf16' or 'fp32'"
            )
        scaler = GradScaler(state.device.name if state.device.name == 'cpu' else 'cuda')
        if state.scaler is not None and state.scaler.is_enabled():
            scaler.load_state_dict(state.scaler.state_dict())
        state.scaler = scaler


class TrainerLink:
    """What a wrapped optimizer asks its trainer: the time of a step, and control of the trainer's records."""

    def __init__(self, state: State, logger: Logger):
        self._state = state
        self._logger = logger

    def moment(self) -> Moment:
        return Moment(self._state.timestamp.batch.value, self._state)

    def control(self, closure: Callable[..., Any]) -> TrainerControl:
        return TrainerControl(self._state, closure)

    def unsynchronised(self, closure: Callable[..., Any]) -> Any:
        """The context in which Composer's closure leaves gradients on their rank whatever ``ddp_sync_strategy`` says.

        Called with ``ddp_sync=False`` it does so by itself, but for ``'forced_sync'``: there it reduces gradients by
        hand after the backward.
        """
        cell = closure_cell(closure, 'self')
        return contextlib.nullcontext() if cell is None else _no_forced_sync(cell.cell_contents)

    def direction_found(self) -> None:
        """Clip the direction, if the trainer clips gradients."""
        for algorithm in self._state.algorithms:
            if isinstance(algorithm, GradientClipping):
                algorithm.apply(Event.AFTER_TRAIN_BATCH, self._state, self._logger)

    def passes_done(self) -> None:
        """Report the memory, if the trainer does: once for all passes."""
        for callback in self._state.callbacks:
            if isinstance(callback, MemoryMonitor):
                callback.after_train_batch(self._state, self._logger)


@contextlib.contextmanager
def _no_forced_sync(trainer: Any) -> Iterator[None]:
    strategy = trainer._ddp_sync_strategy
    if strategy == DDPSyncStrategy.FORCED_SYNC:
        trainer._ddp_sync_strategy = DDPSyncStrategy.MULTI_AUTO_SYNC  # no context of its own inside Composer's no_sync
    try:
        yield
    finally:
        trainer._ddp_sync_strategy = strategy


def _check_field(field: dataclasses.Field, value: Any) -> None:
    """Check a declared hyper-parameter: its range, its choices, or that a flag is a flag."""
    if 'range' in field.metadata and not (value is None and field.default is None):
        _check_range(field.name, value, *field.metadata['range'])
    if 'choices' in field.metadata and value not in field.metadata['choices']:
        raise ValueError(f'{field.name} must be one of {", ".join(field.metadata["choices"])}, got {value!r}')
    if isinstance(field.default, bool) and not isinstance(value, bool):
        raise ValueError(f'{field.name} must be true or false, got {value!r}')


def _check_range(name: str, value: Any, gt: float | None, ge: float | None, lt: float | None) -> None:
    bounds = [f'{sign} {bound:g}' for sign, bound in (('>', gt), ('>=', ge), ('<', lt)) if bound is not None]
    number = isinstance(value, Real) and not isinstance(value, bool)
    size = float(value) if number else math.nan
    if (
        not math.isfinite(size)
        or (gt is not None and size <= gt)
        or (ge is not None and size < ge)
        or (lt is not None and size >= lt)
    ):
        wanted = ' '.join(['a finite number', ' and '.join(bounds)]).strip()
        raise ValueError(f'{name} must be {wanted}, got {value!r}')


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
    if moment.state is None:
        return moment.batch >= time.value
    timestamp, length = moment.state.timestamp, moment.state.max_duration
    if time.unit != TimeUnit.DURATION:
        return timestamp.get(time.unit) >= time
    if length is None:
        raise ValueError(f'{time.to_timestring()} needs max_duration')
    return timestamp.get(length.unit).value / length.value >= time.value


def _is_composer_scheduler(schedule: Any) -> bool:
    # A protocol that cannot be asked by isinstance; Composer's schedulers name it as their base.
    return ComposerScheduler in type(schedule).__mro__


def _factor(name: str, schedule: Callable[..., float], moment: Moment) -> float:
    if _is_composer_scheduler(schedule):
        factor = schedule(moment.state)
    else:
        factor = schedule(Timestamp(batch=moment.batch) if moment.state is None else moment.state.timestamp)
    _check_range(f'the factor of schedules[{name!r}] at step {moment.batch}', factor, None, 0, None)
    return float(factor)

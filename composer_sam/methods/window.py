"""The steps to perturb, by an interval, a start and an end; and factors that follow a schedule."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from composer_sam.engine.moment import Moment
from composer_sam.methods.hyperparameters import Range, check_count

__all__ = [
    'Schedules',
    'Time',
    'TimeLike',
    'Window',
    'check_schedules',
    'check_schedules_alone',
    'factor_of',
]

log = logging.getLogger(__name__)

Schedule = Callable[[Any], float]
Schedules = Mapping[str, Schedule]

# Composer's time strings: a number and a unit.
_TIME = re.compile(r'(?P<value>.+?)(?P<unit>iter|ep|ba|sp|tok|dur|sec)', re.IGNORECASE)
_CLOCK = re.compile(r'(\d+[hms])+')  # '1h30m', which Composer reads as seconds
_FACTOR = Range(ge=0)
_EXAMPLES = {'ba': '500ba', 'ep': '10ep', 'dur': '0.8dur'}
_ROUNDING = 1e-6  # in steps: parts of a run are quotients of floats


@runtime_checkable
class TimeLike(Protocol):
    """The protocol of Composer's ``Time``."""

    def to_timestring(self) -> str: ...


@dataclass(frozen=True)
class Time:
    """A moment of a run, as the number of units that are over.

    Attributes:
        value: number of units.
        unit: unit of a Composer time string: ``'ba'``, ``'ep'``, ``'sp'``, ``'tok'``, ``'iter'``, or ``'dur'`` for a
            part of the run.
        text: the time as the user wrote it.
    """

    value: float
    unit: str
    text: str

    @classmethod
    def parse(cls, name: str, given: object) -> Time:
        """Parse a time string or a ``Time`` of Composer.

        Raises:
            ValueError: it is not a time, or ranks and runs would not agree on it.
        """
        written = given.to_timestring() if isinstance(given, TimeLike) else given
        text = written if isinstance(written, str) else ''
        found = _TIME.fullmatch(text)
        value = _finite(found['value']) if found else None
        unit = found['unit'].lower() if found else ''
        if unit == 'sec' or _CLOCK.fullmatch(text):
            raise ValueError(f'{name} must not be in seconds, which differ between ranks and runs, got {given!r}')
        if value is None or (unit != 'dur' and value != int(value)):
            raise ValueError(f"{name} must be a Composer time such as '0.8dur', '10ep' or '500ba', got {given!r}")
        if value < 0:
            raise ValueError(f'{name} must not be negative, got {given!r}')
        return cls(value, unit, text)

    def reached(self, moment: Moment) -> bool:
        """Return whether the run has reached this time."""
        return moment.elapsed(self.unit) >= self.value


@dataclass(frozen=True)
class Window:
    """The steps that are perturbed.

    Attributes:
        interval: number of steps from one perturbed step to the next.
        start: the first moment; None for the beginning.
        end: the first moment at which no step is perturbed any more; None for the end of the run.
    """

    interval: int
    start: Time | None
    end: Time | None

    @classmethod
    def of(cls, interval: object, start: object, end: object) -> Window:
        """Return the window that a method's arguments describe.

        Raises:
            ValueError: an argument is out of its range, or no step can be in the window.
        """
        steps = check_count('interval', interval)
        first = None if start is None else Time.parse('start', start)
        last = None if end is None else Time.parse('end', end)
        if first is not None and last is not None and first.unit == last.unit and first.value >= last.value:
            raise ValueError(f'start must lie before end, got start={first.text!r} and end={last.text!r}')
        return cls(steps, first, last)

    def holds(self, moment: Moment) -> bool:
        """Return whether the step at ``moment`` is perturbed."""
        if (moment.batch + 1) % self.interval:
            return False
        started = self.start is None or self.start.reached(moment)
        return started and (self.end is None or not self.end.reached(moment))

    @property
    def bounds(self) -> tuple[tuple[str, Time], ...]:
        """The bounds that are set, by name."""
        pairs = (('start', self.start), ('end', self.end))
        return tuple((name, time) for name, time in pairs if time is not None)

    def check_units(self, units: Sequence[str]) -> None:
        """Raise ValueError for a bound in a unit that the host cannot measure."""
        for name, time in self.bounds:
            if time.unit not in units:
                examples = ' or '.join(repr(_EXAMPLES[unit]) for unit in units)
                raise ValueError(
                    f'{name}={time.text!r} needs a Composer Trainer to measure it: '
                    f'without one, give {name} as for example {examples}'
                )

    def check_run(self, method: str, run: str, unit: float | None, part: Callable[[float, str], float | None]) -> None:
        """Check the bounds against the length of a run, before it begins.

        Args:
            method: the method's name, for the log.
            run: the run's length, as text for messages.
            unit: the part of the run that one unit of its length makes up; None if that is unknown.
            part: returns the part of the run that a number of units makes up, or None if it is unknown.

        Raises:
            ValueError: no step of the run is in the window, or a bound is a part of a run that has no length.
        """
        parts = {name: part(time.value, time.unit) for name, time in self.bounds}
        for name, time in self.bounds:
            if time.unit == 'dur' and parts[name] is None:
                raise ValueError(f'{name}={time.text!r} needs a run of known length (max_duration)')
        first, last = parts.get('start'), parts.get('end')
        if first is not None and last is not None and first >= last and self.start and self.end:
            raise ValueError(
                f'start must lie before end, got start={self.start.text!r} and end={self.end.text!r} in a run of {run}'
            )
        first, last = _reached(self.start, first, unit), _reached(self.end, last, unit)
        if first is not None and first >= 1 and self.start:
            log.warning(
                'start=%r is never reached in a run of %s: %s will perturb no step', self.start.text, run, method
            )
        elif self._is_empty(part(1, 'ba'), first, last):
            log.warning('%s will perturb no step of a run of %s: %s', method, run, self._described())
        if last is not None and last > 1 and self.end:
            log.warning('end=%r is never reached in a run of %s', self.end.text, run)

    def _is_empty(self, step: float | None, first: float | None, last: float | None) -> bool:
        """Return whether no step of a run is perturbed; False if the run's length in steps is unknown.

        Args:
            step: the part of the run that one step makes up, None if that is unknown.
            first: the part of the run after which perturbing begins.
            last: the part after which it ends.
        """
        if step is None:
            return False
        length = round(1 / step)
        begin = 0 if first is None else math.ceil(first * length - _ROUNDING)
        end = length if last is None else min(length, math.ceil(last * length - _ROUNDING))
        perturbed = math.ceil((begin + 1) / self.interval) * self.interval - 1  # steps k, 2k, ... counted from 1
        return perturbed >= end

    def _described(self) -> str:
        return ', '.join([f'interval={self.interval}', *(f'{name}={time.text!r}' for name, time in self.bounds)])


def _reached(time: Time | None, part: float | None, unit: float | None) -> float | None:
    """Return the part of the run after which a bound is reached.

    A trainer counts a run in units of its length: half of a run of 3 epochs is over after the second.
    """
    if time is None or part is None or unit is None or time.unit != 'dur':
        return part
    return math.ceil(part / unit - _ROUNDING) * unit


def check_schedules(method: str, schedules: Schedules, known: list[str]) -> None:
    """Raise ValueError for a schedule of an unknown hyper-parameter, or one that cannot be called.

    Args:
        method: the method's name.
        schedules: the schedules by hyper-parameter name.
        known: the names of the numeric hyper-parameters that have a value.
    """
    for name, schedule in schedules.items():
        if name not in known:
            raise ValueError(f'schedules has no hyper-parameter {name!r} to follow: {method} has {", ".join(known)}')
        if not callable(schedule):
            raise ValueError(
                f'schedules[{name!r}] must be a Composer scheduler or a callable of the timestamp, got {schedule!r}'
            )


def check_schedules_alone(schedules: Schedules) -> None:
    """Raise ValueError for a schedule that needs a trainer."""
    for name, schedule in schedules.items():
        # By name, because Composer need not be installed. Its schedulers have this protocol as a base class.
        kind: type = type(schedule)
        if any(base.__qualname__ == 'ComposerScheduler' for base in kind.__mro__):
            raise ValueError(
                f'schedules[{name!r}] is a Composer scheduler, which needs a Composer Trainer: '
                'without one, give a callable of the timestamp'
            )


def factor_of(name: str, schedule: Schedule, moment: Moment) -> float:
    """Return the factor of a hyper-parameter at a moment; 0 is allowed, so that a radius may start or end at 0.

    Raises:
        ValueError: the schedule's value is not a finite number >= 0.
    """
    return _FACTOR.check(f'the factor of schedules[{name!r}] at step {moment.batch}', moment.factor(schedule))


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

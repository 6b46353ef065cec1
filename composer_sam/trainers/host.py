"""What the hosts of trainers share: time in steps and epochs, and the numbers to log of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from composer_sam.engine.host import Alone
from composer_sam.engine.moment import Moment
from composer_sam.engine.record import StepRecord
from composer_sam.engine.rule import Method

__all__ = ['Length', 'SplitHost', 'TrainerMoment', 'logged']


def logged(method: Method, record: StepRecord) -> dict[str, float]:
    """Return what to log of a step, by names that begin with the method's; of a step of the base optimizer the phase.

    It reads the gradient's norm and the last loss from the device.
    """
    phase = (record.moment.batch + 1) % method.interval
    found: dict[str, float] = {'perturbed': float(record.rule is not None), 'interval_phase': phase}
    if record.rule is not None:
        found |= method.logged(record.rule)
        if record.gradient_norm is not None:
            found['gradient_norm'] = record.gradient_norm.item()
        if len(record.losses) > 1:
            found['perturbed_loss'] = float(record.losses[-1])
    return {f'{type(method).__name__.lower()}/{key}': value for key, value in found.items()}


@dataclass(frozen=True)
class Length:
    """The length of a run.

    Attributes:
        steps: number of optimizer steps; None if it is unknown.
        epochs: number of epochs; None if the run is not measured in epochs.
    """

    steps: int | None
    epochs: float | None

    def part(self, value: float, unit: str) -> float | None:
        """Return the part of the run that a number of units makes up; None if it is unknown."""
        if unit == 'dur':
            return value if self.steps else None
        whole = self.steps if unit == 'ba' else self.epochs
        return value / whole if whole else None

    def check(self, method: Method) -> None:
        """Raise ValueError or warn if the method would perturb no step of the run."""
        unit = 1 / self.steps if self.steps else None
        method.check_run(f'{self.steps or "an unknown number of"} steps', unit, self.part)


@dataclass(frozen=True)
class TrainerMoment(Moment):
    """The time of a step of a trainer that counts steps and epochs.

    Args:
        epoch: number of epochs that are over.
        length: of the run.
    """

    epoch: int
    length: Length

    def elapsed(self, unit: str) -> float:
        if unit == 'ba':
            return self.batch
        return self.epoch if unit == 'ep' else self.part()

    def part(self) -> float:
        part = self.length.part(self.batch, 'ba')
        if part is None:
            raise ValueError('a part of the run (dur) needs a run of a known number of steps')
        return part


class SplitHost(Alone):
    """The host of a step that is split around a trainer's own work; an adapter says what the time is.

    Args:
        moment: returns the time of the next step, given the number of steps taken.
        report: takes what to log of a step; None logs nothing.
        units: those it measures time in.
    """

    steps_by_itself = True

    def __init__(
        self,
        moment: Callable[[int], TrainerMoment],
        report: Callable[[Method, StepRecord], None] | None = None,
        units: Sequence[str] = ('ba', 'ep', 'dur'),
    ):
        self._moment = moment
        self._report = report
        self._units = units

    def check(self, method: Method) -> None:
        method.check_host(self._units)

    def moment(self, steps_taken: int) -> Moment:
        return self._moment(steps_taken)

    def stepped(self, method: Method, record: StepRecord) -> None:
        if self._report is not None:
            self._report(method, record)

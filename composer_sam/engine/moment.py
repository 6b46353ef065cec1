"""When a step happens, as the host of the training loop tells the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ['Count', 'Moment', 'Timestamp']


class Count(int):
    """A number of steps, which also has a trainer's ``.value``."""

    @property
    def value(self) -> int:
        return int(self)


@dataclass(frozen=True)
class Timestamp:
    """What a schedule is called with in a loop of your own: ``timestamp.batch`` steps were taken before this one."""

    batch: Count


@dataclass(frozen=True)
class Moment:
    """When a step happens, as its host tells the time; this one is of a loop of your own, which counts steps.

    Args:
        batch: the number of steps before it.
    """

    batch: int

    def elapsed(self, unit: str) -> float:
        """How much of the run is over, in a unit of time strings: ``'ba'`` steps, ``'ep'`` epochs, ``'dur'`` as a part
        of the whole.

        Raises:
            ValueError: the host cannot tell the time in that unit.
        """
        if unit != 'ba':
            raise ValueError(f'a loop of your own tells the time in steps (ba), not in {unit!r}')
        return self.batch

    def factor(self, schedule: Callable[[Any], float]) -> float:
        """A schedule's factor at this moment."""
        return schedule(Timestamp(Count(self.batch)))

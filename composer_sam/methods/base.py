"""What all methods share: the steps to perturb, and hyper-parameters over time and per parameter group."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from composer_sam.engine.counting import count
from composer_sam.engine.moment import Moment
from composer_sam.engine.rule import Method, OnNonfinite, Passes
from composer_sam.engine.selection import Selection, check_selection
from composer_sam.engine.step import Step
from composer_sam.methods.composer_protocol import ComposerAlgorithm
from composer_sam.methods.hyperparameters import check_field, choice, numeric, per_parameter
from composer_sam.methods.window import Schedules, TimeLike, Window, check_schedules, check_schedules_alone, factor_of
from composer_sam.vectors import each

__all__ = ['SharpnessAware']


@dataclass(eq=False, kw_only=True)
class SharpnessAware(Method, ComposerAlgorithm):
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
    start: str | TimeLike | None = None
    end: str | TimeLike | None = None
    sync_first_pass: bool = False
    parameters: Selection | None = None
    schedules: Schedules | None = None
    on_nonfinite: OnNonfinite = choice('propagate', 'skip')

    paper: ClassVar[str] = ''
    extra_copies: ClassVar[int] = 1

    def direction(self, step: Step) -> Passes:
        """The update rule: yields a :class:`Pass` and is sent its gradient, any number of times; returns a
        :class:`Direction`. It sees vectors only, never parameters, gradients or the base optimizer."""
        raise NotImplementedError(f'{type(self).__name__} must define direction(step)')

    @functools.cached_property
    def passes(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Forward-backward passes of a perturbing step, counted on the rule itself."""
        return count(self).passes

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_field(field, getattr(self, field.name))
        self.window = Window.of(self.interval, self.start, self.end)
        check_selection(self.parameters)
        known = [name for name in numeric(type(self)) if getattr(self, name) is not None]
        check_schedules(type(self).__name__, self.schedules or {}, known)

    def perturbs(self, moment: Moment) -> bool:
        return self.window.holds(moment)

    def resolved(self, moment: Moment, groups: Sequence[tuple[dict[str, Any], int]]) -> SharpnessAware:
        own: dict[str, Any] = {}
        for name, allowed in numeric(type(self)).items():
            if any(name in values for values, _ in groups):
                if not allowed.per_group:
                    raise ValueError(f'{name} cannot differ between parameter groups in {type(self).__name__}')
                own[name] = per_parameter(name, allowed, getattr(self, name), groups)
        for name, schedule in (self.schedules or {}).items():
            factor = factor_of(name, schedule, moment)
            own[name] = each(lambda value, factor=factor: factor * value, own.get(name, getattr(self, name)))
        if not own:
            return self
        method = copy.copy(self)
        for name, value in own.items():
            setattr(method, name, value)
        return method

    def check_alone(self) -> None:
        check_schedules_alone(self.schedules or {})
        self.window.check_alone()

    def check_run(self, run: str, part: Callable[[float, str], float | None]) -> None:
        self.window.check_run(type(self).__name__, run, part)

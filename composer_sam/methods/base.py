"""The base class of all methods: the steps to perturb, and hyper-parameters over time and per parameter group."""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim import Optimizer

from composer_sam.engine.counting import count_steps
from composer_sam.engine.moment import Moment
from composer_sam.engine.rule import Method, OnNonfinite, Rule
from composer_sam.engine.selection import Multipliers, Selection, check_multipliers, check_selection
from composer_sam.engine.step import Step
from composer_sam.methods.classic import OfInit, check_not_classic
from composer_sam.methods.composer_protocol import ComposerAlgorithm
from composer_sam.methods.hyperparameters import check_field, choice, hyperparameter, numeric, per_parameter
from composer_sam.methods.window import Schedules, TimeLike, Window, check_schedules, check_schedules_alone, factor_of
from composer_sam.vectors import PerParameter, Vector, each

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ['SharpnessAware']

_COUNTED_STEPS = 50  # of a method whose steps differ


@dataclass(eq=False, kw_only=True)
class SharpnessAware(Method, ComposerAlgorithm):
    """The base class of all methods. A method is a dataclass that extends it, declares its hyper-parameters and defines
    its update rule in :meth:`direction`.

    Args:
        interval: perturb at steps ``interval``, ``2 * interval``, ...; the others are plain base steps. Under a Trainer
            the trainer's batch counter decides, so a resumed run perturbs the same steps.
        start: first moment at which steps are perturbed, as a Composer time string (``'0.8dur'``, ``'10ep'``,
            ``'500ba'``); earlier steps are plain base steps, at their cost. None: from the beginning.
        end: first moment at which steps are no longer perturbed. None: to the last step.
        sync_first_pass: average the first pass's gradient over ranks, so that all ranks use the same perturbation. By
            default each rank perturbs by its own gradient (m-sharpness), which saves the communication.
        parameters: which parameters are perturbed: a regular expression searched for in their names, one of the words
            ``'normalization'``, ``'bias'``, ``'linear'``, ``'embedding'``, ``'lora'`` for those of such layers, or a
            predicate of name and parameter. The others get the direction but no offset, and do not count in the
            radius. None: all.
        multipliers: factors >= 0 on the gradient before its radius is taken, by regular expressions for the names of
            parameters: ``{'embed': 0.1}`` (layerwise perturbation scaling). Where several match, their product. None:
            1 for all.
        ascent_fraction: the part of each rank's batch that the first pass sees, in (0, 1]: its first samples, rounded
            up. The step then costs 1 + ``ascent_fraction`` passes. Loss, metrics, outputs and BatchNorm statistics are
            those of the second pass, the first over the whole batch, at the perturbed weights. For methods whose first
            pass only finds the perturbation. In a loop over ``passes()`` the number of the pass cuts the batch,
            ``number.part(batch)``; a closure must take that number.
        schedules: factors by which hyper-parameters are multiplied over time, by name: a Composer scheduler
            (``{'rho': CosineAnnealingScheduler()}``; needs a Trainer) or a callable of the timestamp. A factor of 0
            is allowed: the radius may start or end at 0.
        on_nonfinite: what a step does if the loss or the gradient of any pass is not finite. ``'propagate'``: step with
            it, as the base optimizer alone does; the first such loss is reported in the log. ``'skip'``: skip the step
            on all ranks, perturbed or not; weights, optimizer state and buffers stay as they were, and only the random
            streams advance. Per pass this costs a read of the gradient, a reduction of one number over the ranks and a
            wait for the device.
    """

    interval: int = 1
    start: str | TimeLike | None = None
    end: str | TimeLike | None = None
    sync_first_pass: bool = False
    parameters: Selection | None = None
    multipliers: Multipliers | None = None
    ascent_fraction: float = hyperparameter(1.0, gt=0, le=1, per_group=False)
    schedules: Schedules | None = None
    on_nonfinite: OnNonfinite = choice('propagate', 'skip')

    paper: ClassVar[str] = ''
    when: ClassVar[str] = ''
    radius: ClassVar[str] = 'rho'  # what the names of its radii end in
    first_pass_only_perturbs: ClassVar[bool] = False
    extra_copies: ClassVar[int] = 1
    for_studies: ClassVar[bool] = False  # a building block of studies rather than a method to train with
    passes_follow_data: ClassVar[bool] = False  # the gradients decide how many passes a step takes

    @functools.cached_property
    def passes(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The largest number of forward-backward passes of a perturbed step, counted on the rule itself."""
        return max(self._passes_of_steps)

    @property
    def fewest_passes(self) -> int:
        """The smallest number of passes of a perturbed step."""
        return min(self._passes_of_steps)

    @property
    def mean_passes(self) -> float | None:
        """The average number of passes of a perturbed step, whole or not; None if the gradients decide it."""
        return None if self.passes_follow_data else sum(self._passes_of_steps) / len(self._passes_of_steps)

    @functools.cached_property
    def _passes_of_steps(self) -> list[int]:
        return [found.passes for found in count_steps(self, range(_COUNTED_STEPS if self.varies else 1))]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if '__repr__' not in vars(cls):
            cls.__repr__ = SharpnessAware.__repr__  # before the dataclass makes one that shows every default

    # What a method is made with is what its dataclass says, whatever ``__new__`` looks like.
    __signature__ = OfInit()

    def __new__(cls, *args: Any, **options: Any) -> Self:
        check_not_classic(cls, args, options)
        return super().__new__(cls)

    def __repr__(self) -> str:
        shown = (
            f'{field.name}={getattr(self, field.name)!r}'
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        )
        return f'{type(self).__name__}({", ".join(shown)})'

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_field(field, getattr(self, field.name))
        self.window = Window.of(self.interval, self.start, self.end)
        check_selection(self.parameters)
        check_multipliers(self.multipliers)
        if self.ascent_fraction < 1 and not self.first_pass_only_perturbs:
            raise ValueError(
                f'ascent_fraction={self.ascent_fraction} cannot be used with {type(self).__name__}: its first gradient '
                'is a part of the direction, which must be of the whole batch'
            )
        known = [n for n in numeric(type(self)) if getattr(self, n) is not None and n != 'ascent_fraction']
        check_schedules(type(self).__name__, self.schedules or {}, known)

    def refuse_sync_first_pass(self, why: str) -> None:
        """Raise ValueError if ``sync_first_pass`` is set, which means nothing to the method."""
        if self.sync_first_pass:
            raise ValueError(f'sync_first_pass=True means nothing to {type(self).__name__}: {why}')

    def averaged(self, step: Step, grad: Vector) -> Vector:
        """Return the first gradient averaged over ranks, and give up the one that was not."""
        return grad if self.sync_first_pass else step.mean(grad.donate())

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
            own[name] = each(operator.mul, factor, own.get(name, getattr(self, name)))
        if not own:
            return self
        method = copy.copy(self)
        for name, value in own.items():
            setattr(method, name, value)
        return method

    def logged(self, rule: Rule) -> dict[str, float]:
        names = [name for name in numeric(type(self)) if name.endswith(self.radius) or name in (self.schedules or {})]
        values = {name: getattr(rule, name) for name in names}
        # Of groups that differ the largest.
        return {name: float(max(v) if isinstance(v, PerParameter) else v) for name, v in values.items()}

    def check_base(self, base_optimizer: Optimizer) -> None:
        del base_optimizer  # most methods can be used with any

    def check_host(self, units: Sequence[str]) -> None:
        check_schedules_alone(self.schedules or {})
        self.window.check_units(units)

    def check_run(self, run: str, unit: float | None, part: Callable[[float, str], float | None]) -> None:
        self.window.check_run(type(self).__name__, run, unit, part)

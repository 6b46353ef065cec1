"""The interface of a method to the engine: the passes it requests, its direction, and the steps it perturbs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from torch.optim import Optimizer

from composer_sam.engine.moment import Moment
from composer_sam.engine.outputs import OutputGradients
from composer_sam.engine.selection import Multipliers, Selection
from composer_sam.engine.step import Step
from composer_sam.vectors import Vector

__all__ = [
    'PLAIN',
    'Direction',
    'Method',
    'Observer',
    'OnNonfinite',
    'Pass',
    'Passes',
    'PlainRule',
    'Rule',
    'check_method',
]


@dataclass(frozen=True)
class Pass:
    """A method's request for one forward-backward over the batch.

    Args:
        at: absolute offset from the weights w; ``None`` is w itself. If it is donated, its memory is overwritten.
        sync: False does not average the gradient over ranks, if the model's wrapper can do that
            (DistributedDataParallel); with one process and under FSDP it makes no difference.
        graph: keep the gradient's graph, so that it can be differentiated again. The closure must call
            ``backward(create_graph=True)``.
        outputs: what keeps, or replaces, the loss's gradient at the model's outputs.
        fraction: the part of the batch's samples that the pass sees, in (0, 1].
        counts: whether the step's loss, metrics, buffers and random numbers are this pass's; the engine decides: it is
            the first pass over the whole batch.
    """

    at: Vector | None = None
    sync: bool = True
    graph: bool = False
    outputs: OutputGradients | None = None
    fraction: float = 1.0
    counts: bool = True


# The one pass of a step that is not perturbed.
PLAIN = Pass()


@dataclass(frozen=True)
class Direction:
    """The result of a method's rule.

    Args:
        gradients: passed to the base optimizer in place of the plain gradient.
        decoupled: applied after the base optimizer's step as w <- w - lr * decoupled, with each group's current lr; the
            base optimizer does not see it.
    """

    gradients: Vector
    decoupled: Vector | None = None


Passes: TypeAlias = Generator[Pass, Vector, Direction]
# Called with the plain gradient and the direction that replaces it.
Observer: TypeAlias = Callable[[Vector, Vector], object]
# The policy for a loss or a gradient that is not finite.
OnNonfinite: TypeAlias = Literal['propagate', 'skip']


class Rule(Protocol):
    """The protocol of an update rule, with its hyper-parameters as they are at one step."""

    parameters: Selection | None
    multipliers: Multipliers | None

    def direction(self, step: Step) -> Passes:
        """Yield any number of :class:`Pass`, receive the gradient of each, and return a :class:`Direction`."""
        ...


class PlainRule:
    """The base optimizer's own step as a rule: one pass, whose gradient is the direction."""

    parameters: Selection | None = None
    multipliers: Multipliers | None = None

    def direction(self, step: Step) -> Passes:
        del step
        return Direction((yield PLAIN))


class Method(ABC):
    """A method as the optimizer sees it: a rule, the steps it perturbs, and its policy for non-finite numbers.

    Attributes:
        interval: every how many steps one is perturbed.
        parameters: which parameters are perturbed; None for all.
        multipliers: factors on the perturbation of parameters; None for none.
        ascent_fraction: the part of the batch that the first pass sees.
        on_nonfinite: the policy for a loss or a gradient that is not finite.
        takes_every_step: whether steps that are not perturbed also go through :meth:`direction`. Otherwise the base
            optimizer takes them alone.
        varies: whether some perturbed steps take fewer passes than others.
        perturbs_first_pass: whether the first pass is at perturbed weights, so that no pass is at w.
        watches_outputs: whether the method watches the outputs of forwards, for which it needs the model.
        held_copies: what the method remembers between steps, in copies of the parameters.
        held_numbers: the names of the single numbers that it remembers besides.
        backwards_create_graph: whether the backward must be differentiable.
        passes: the largest number of forward-backward passes of a perturbed step.
        sync_first_pass: whether the first pass's gradient is averaged over ranks.
    """

    parameters: Selection | None
    multipliers: Multipliers | None
    ascent_fraction: float
    sync_first_pass: bool
    on_nonfinite: OnNonfinite
    takes_every_step: ClassVar[bool] = False
    varies: ClassVar[bool] = False
    perturbs_first_pass: ClassVar[bool] = False
    watches_outputs: ClassVar[bool] = False
    held_copies: ClassVar[int] = 0
    held_numbers: ClassVar[tuple[str, ...]] = ()
    interval: int

    @property
    def remembers(self) -> bool:
        """Whether the method holds anything between steps."""
        return bool(self.held_copies or self.held_numbers)

    @property
    def backwards_create_graph(self) -> bool:
        return False

    @property
    @abstractmethod
    def passes(self) -> int: ...

    @abstractmethod
    def direction(self, step: Step) -> Passes:
        """Yield any number of :class:`Pass`, receive the gradient of each, and return a :class:`Direction`.

        The update rule sees vectors only, never parameters, gradients or the base optimizer.
        """

    @abstractmethod
    def perturbs(self, moment: Moment) -> bool:
        """Return whether the step at ``moment`` is perturbed."""

    @abstractmethod
    def resolved(self, moment: Moment, groups: Sequence[tuple[dict[str, Any], int]]) -> Rule:
        """Return the rule with every hyper-parameter as it is at one step.

        Args:
            moment: the time of the step.
            groups: for each parameter group, its own values and its number of trainable parameters; empty if no group
                has any.
        """

    @abstractmethod
    def logged(self, rule: Rule) -> dict[str, float]:
        """Return the numbers to log of a step, by name: the radii, and what follows a schedule.

        Args:
            rule: what :meth:`resolved` returned for the step.
        """

    @abstractmethod
    def check_base(self, base_optimizer: Optimizer) -> None:
        """Raise ValueError if the method cannot be used with the base optimizer."""

    @abstractmethod
    def check_host(self, units: Sequence[str]) -> None:
        """Raise ValueError if the method needs what this host does not know.

        Args:
            units: those the host measures time in: ``'ba'`` (steps), ``'ep'`` (epochs), ``'dur'`` (part of the run).
        """

    @abstractmethod
    def check_run(self, run: str, unit: float | None, part: Callable[[float, str], float | None]) -> None:
        """Check the steps to perturb against the length of a run, before it begins.

        Args:
            run: the run's length, as text for messages.
            unit: the part of the run that one unit of its length makes up; None if that is unknown.
            part: returns the part of the run that a number of units makes up, or None if it is unknown.

        Raises:
            ValueError: no step of the run can be perturbed.
        """


def check_method(method: object) -> None:
    """Raise TypeError for what is not a method."""
    if not isinstance(method, Method):
        raise TypeError(f"method must be one of composer_sam's methods, for example SAM(rho=0.05), got {method!r}")

"""What a method says to the engine: the passes it asks for, the direction it finds, and which steps it takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from composer_sam.engine.moment import Moment
from composer_sam.engine.selection import Selection
from composer_sam.engine.step import Step
from composer_sam.vectors import Vector

__all__ = ['PLAIN', 'Direction', 'Method', 'Observer', 'OnNonfinite', 'Pass', 'Passes', 'PlainRule', 'Rule']


@dataclass(frozen=True)
class Pass:
    """A method's request for one forward-backward over the batch.

    Args:
        at: absolute offset from the weights w; ``None`` is w itself. Its memory is used up where it was donated.
        sync: False leaves the gradient of this rank's samples unaveraged, where the model's wrapper can do that
            (DistributedDataParallel); with one process and under FSDP it makes no difference.
        graph: the gradient is asked for with its graph, to be differentiated again. The closure must call
            ``backward(create_graph=True)``.
    """

    at: Vector | None = None
    sync: bool = True
    graph: bool = False


# The one pass of a step that is not perturbed.
PLAIN = Pass()


@dataclass(frozen=True)
class Direction:
    """What a method makes of its gradients.

    Args:
        gradients: handed to the base optimizer in place of the plain gradient.
        decoupled: applied after the base optimizer's step as w <- w - lr * decoupled, with each group's current lr and
            nothing else of the base optimizer.
    """

    gradients: Vector
    decoupled: Vector | None = None


Passes: TypeAlias = Generator[Pass, Vector, Direction]
# Shown the plain gradient and the direction that replaces it.
Observer: TypeAlias = Callable[[Vector, Vector], object]
# What a step does about a loss or a gradient that is not finite.
OnNonfinite: TypeAlias = Literal['propagate', 'skip']


class Rule(Protocol):
    """An update rule, as one step needs it."""

    parameters: Selection | None

    def direction(self, step: Step) -> Passes:
        """Yield a :class:`Pass` and be sent its gradient, any number of times; return a :class:`Direction`."""
        ...


class PlainRule:
    """The base optimizer's own step as a rule: one pass, and its gradient as it is."""

    parameters: Selection | None = None

    def direction(self, step: Step) -> Passes:
        del step
        return Direction((yield PLAIN))


class Method(ABC):
    """A method, as the optimizer needs it: a rule, the steps it perturbs, and what it does about non-finite numbers.

    Attributes:
        parameters: which parameters are perturbed; None for all.
        on_nonfinite: what a step does about a loss or a gradient that is not finite.
        takes_every_step: whether the steps that are not perturbed go through :meth:`direction` too. Otherwise they are
            the base optimizer's own.
        backwards_create_graph: whether the backward must be differentiable.
        passes: forward-backward passes of a perturbed step.
        sync_first_pass: whether the first pass's gradient is averaged over ranks.
    """

    parameters: Selection | None
    sync_first_pass: bool
    on_nonfinite: OnNonfinite
    takes_every_step: ClassVar[bool] = False

    @property
    def backwards_create_graph(self) -> bool:
        return False

    @property
    @abstractmethod
    def passes(self) -> int: ...

    @abstractmethod
    def direction(self, step: Step) -> Passes:
        """The update rule: yields a :class:`Pass` and is sent its gradient, any number of times; returns a
        :class:`Direction`. It sees vectors only, never parameters, gradients or the base optimizer."""

    @abstractmethod
    def perturbs(self, moment: Moment) -> bool:
        """Whether the step at ``moment`` is perturbed."""

    @abstractmethod
    def resolved(self, moment: Moment, groups: Sequence[tuple[dict[str, Any], int]]) -> Rule:
        """The rule with every hyper-parameter as it is at one step.

        Args:
            moment: when the step happens.
            groups: for each parameter group the values it sets for itself and its number of trainable parameters.
        """

    @abstractmethod
    def check_alone(self) -> None:
        """Raise ValueError for what only a trainer can tell, such as the part of the run that is over."""

    @abstractmethod
    def check_run(self, run: str, part: Callable[[float, str], float | None]) -> None:
        """Check the steps to perturb against the length of a run, before it begins.

        Args:
            run: the run's length in words.
            part: the part of the run that is over when so many of a unit are; None where nobody can tell.

        Raises:
            ValueError: no step of the run can be perturbed.
        """

"""What a method requests of the ranks, recorded while its rule runs on the engine."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from composer_sam import AESAM, RandomSAM, registry
from composer_sam.engine.counting import count_steps
from composer_sam.engine.moment import Moment
from composer_sam.engine.rule import Passes, PlainRule
from composer_sam.engine.selection import Multipliers, Selection
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.vectors import Layout

__all__ = ['METHODS', 'Needs', 'Variant', 'forwards', 'needs']

WARMUP = 3  # DistributedDataParallel arranges its buckets in its first steps

# Where the gradients or a random number decide about a step's passes, the case that is meant. A step of RandomSAM with
# one pass is the base step.
_AESAM = functools.partial(AESAM, total_steps=10**6)
METHODS: dict[str, Callable[..., SharpnessAware]] = {
    **{name: method for name, method in registry.items() if name not in ('AESAM', 'RandomSAM')},
    'AESAM, all passes': functools.partial(_AESAM, lambda_1=-10.0, lambda_2=-10.0),
    'AESAM, one pass': functools.partial(_AESAM, lambda_1=10.0, lambda_2=10.0),
    'RandomSAM, all passes': functools.partial(RandomSAM, p=1.0),
}


@dataclass(frozen=True)
class Variant:
    """A method, by its name in ``METHODS``, at every ``interval``-th step; ``'SGD'`` is the base step.

    Args:
        name: of the method.
        interval: every how many steps one is perturbed.
        options: its other hyper-parameters, in pairs of name and value.
    """

    name: str
    interval: int = 1
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def method(self) -> SharpnessAware | None:
        return None if self.name == 'SGD' else METHODS[self.name](interval=self.interval, **dict(self.options))

    @property
    def algorithms(self) -> list[SharpnessAware]:
        return [] if self.method is None else [self.method]

    @property
    def steps(self) -> int:
        """The number of steps after which what it does repeats itself: LookSAM perturbs every k-th time only."""
        return self.interval * getattr(self.method, 'k', 1)

    @property
    def warmup(self) -> int:
        """The number of steps after which it has everything that it remembers, and the wrapper its buckets."""
        return WARMUP + self.interval

    @property
    def shardable(self) -> bool:
        """Whether it runs under FSDP, which cannot differentiate a gradient again."""
        return self.method is None or not self.method.backwards_create_graph

    def __str__(self) -> str:
        interval = '' if self.interval == 1 else f', interval {self.interval}'
        return self.name + interval + ''.join(f', {name} {value}' for name, value in self.options)


@dataclass(frozen=True)
class Needs:
    """The requests of ``steps`` steps to the ranks.

    Args:
        steps: as many as it takes until the method repeats itself.
        passes: forward-backward passes.
        reduced: those whose gradient is averaged over ranks; the others stay on their ranks, where the wrapper can.
        means: averages of a whole vector that the method takes itself, where gradients were left on their ranks.
        sums: of numbers over all shards, for norms and inner products.
        summed: how many numbers these add up.
        agreed: numbers that replicas agree on, for a decision that all must make alike.
    """

    steps: int = 0
    passes: int = 0
    reduced: int = 0
    means: int = 0
    sums: int = 0
    summed: int = 0
    agreed: int = 0


class _NotedLayout(Layout):
    def __init__(self, noted: list[list[int]], parameters: Any):
        super().__init__(parameters)
        self._noted = noted

    def sums(self, columns: Any, where: Any) -> list[Tensor]:
        self._noted[-1].append(len(columns))
        return super().sums(columns, where)


class _NotedRule:
    """The rules of a method's steps, one after the other, on a base optimizer that has a momentum.

    Attributes:
        sums: of every step, how many numbers each sum over shards adds up.
        agreed: of every step, how many numbers replicas agree on.
    """

    parameters: Selection | None = None
    multipliers: Multipliers | None = None

    def __init__(self, method: SharpnessAware | None):
        self.sums: list[list[int]] = []
        self.agreed: list[int] = []
        self._method = method

    def direction(self, step: Step) -> Passes:
        self.sums.append([])
        self.agreed.append(0)
        agree = step.agreed

        def agreed(number: Tensor) -> float:
            self.agreed[-1] += 1
            return agree(number)

        vars(step)['agreed'] = agreed
        for parameter in step.layout.parameters:
            step.state[parameter].setdefault('momentum_buffer', torch.ones_like(parameter, requires_grad=False))
        moment, method = Moment(batch=step.number), self._method
        through = method is not None and (method.perturbs(moment) or method.takes_every_step)
        rule = method.resolved(moment, []) if method is not None and through else PlainRule()
        return (yield from rule.direction(step))


@functools.cache
def needs(variant: Variant) -> Needs:
    """Return the requests of a method's steps until it repeats itself, recorded while its rule runs."""
    rule = _NotedRule(variant.method)
    first, steps = variant.warmup, variant.steps
    counts = count_steps(rule, range(first + steps), functools.partial(_NotedLayout, rule.sums))[first:]
    sums = [numbers for step in rule.sums[first:] for numbers in step]
    return Needs(
        steps,
        sum(found.passes for found in counts),
        sum(found.synchronised for found in counts),
        sum(found.averages for found in counts),
        len(sums),
        sum(sums),
        sum(rule.agreed[first:]),
    )


def forwards(variant: Variant, micro_batches: int) -> int:
    """Return the number of micro-batches that the passes of a method's steps evaluate, of so many equal ones a batch.

    With ``ascent_fraction`` the first pass of a perturbed step takes the first of them, as many as hold its samples.
    """
    passes, method = needs(variant).passes, variant.method
    fraction = 1.0 if method is None else method.ascent_fraction
    cut = variant.steps // variant.interval if fraction < 1 else 0
    return (passes - cut) * micro_batches + cut * math.ceil(fraction * micro_batches)

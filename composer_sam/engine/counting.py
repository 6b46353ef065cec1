"""What a step of a method takes, counted on its rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from composer_sam.engine.rule import Rule
from composer_sam.engine.step import Step
from composer_sam.engine.transaction import Transaction
from composer_sam.vectors import Layout, Vector

__all__ = ['Count', 'count']


@dataclass
class Count:
    """What one step of a method takes.

    Attributes:
        passes: Forward and backward.
        synchronised: Those whose gradient is averaged over ranks.
        averages: Of whole vectors, which the method takes itself.
    """

    passes: int = 0
    synchronised: int = 0
    averages: int = 0

    @property
    def collectives(self) -> int:
        """Exchanges of gradients under DistributedDataParallel."""
        return self.synchronised + self.averages


class _CountingStep(Step):
    averages = 0

    def mean(self, x: Vector) -> Vector:
        self.averages += 1
        return super().mean(x)


def count(rule: Rule, number: int = 0, make_layout: Callable[[list[nn.Parameter]], Layout] = Layout) -> Count:
    """Count on the rule itself, by running it on a model of one weight and one bias.

    Args:
        rule: The rule.
        number: How many steps were taken before.
        make_layout: Makes the layout the rule's sums over shards go through.
    """
    model = nn.Linear(1, 1, device='meta').to_empty(device='cpu')  # initialising would draw random numbers
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    unselective = copy.copy(rule)
    unselective.parameters = None
    found = Count()
    step = _CountingStep(make_layout(list(model.parameters())), {}, model, number)
    with Transaction(unselective, step) as transaction:
        for request in transaction.passes():
            model(torch.ones(3, 1)).square().sum().backward(create_graph=request.graph)
            found.passes += 1
            found.synchronised += request.sync
    found.averages = step.averages
    return found

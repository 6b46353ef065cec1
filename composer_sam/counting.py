"""What a step of a method takes, counted on its rule."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from composer_sam.distributed import Layout
from composer_sam.step import Method, Step
from composer_sam.vectors import Vector

__all__ = ['Count', 'count']


@dataclass
class Count:
    """What one step of a method takes: passes, and exchanges of gradients under DistributedDataParallel."""

    passes: int = 0
    collectives: int = 0


class _CountingStep(Step):
    averages = 0

    def mean(self, x: Vector) -> Vector:
        self.averages += 1
        return super().mean(x)


def count(method: Method) -> Count:
    """Count on the rule itself, by running it on a model of one weight and one bias."""
    model = nn.Linear(1, 1, device='meta').to_empty(device='cpu')  # initialising would draw random numbers
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    selected = copy.copy(method)
    selected.parameters = None
    found = Count()
    step = _CountingStep(selected, Layout(list(model.parameters())), {}, model)
    with step:
        for request in step.passes():
            model(torch.ones(3, 1)).square().sum().backward(create_graph=request.graph)
            found.passes += 1
            found.collectives += request.sync
        found.collectives += step.averages
    return found

"""Every method as its paper writes it: on one flat fp64 vector of weights, naively, with nothing of the engine.

A specification takes ``gradient`` (flat weights -> flat gradient of the batch), the weights ``w`` and the method's
hyper-parameters, and returns the direction for the base optimizer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Gradient = Callable[[Tensor], Tensor]


def sam(gradient: Gradient, w: Tensor, rho: float = 0.05, epsilon: float = 1e-12) -> Tensor:
    g = gradient(w)
    e = rho * g / (g.norm() + epsilon)
    return gradient(w + e)


SPECIFICATIONS = {'SAM': sam}


class SGD:
    """lr 0.05, momentum 0.9, weight decay 1e-2, as in problems.BASES."""

    buffer: Tensor | None = None

    def step(self, w: Tensor, direction: Tensor) -> Tensor:
        d = direction + 1e-2 * w
        self.buffer = d if self.buffer is None else 0.9 * self.buffer + d
        return w - 0.05 * self.buffer


class AdamW:
    """lr 0.01, betas 0.9 and 0.999, eps 1e-8, weight decay 1e-1, as in problems.BASES."""

    t = 0

    def step(self, w: Tensor, direction: Tensor) -> Tensor:
        if self.t == 0:
            self.m, self.v = torch.zeros_like(w), torch.zeros_like(w)
        self.t += 1
        w = w - 0.01 * 1e-1 * w
        self.m = 0.9 * self.m + 0.1 * direction
        self.v = 0.999 * self.v + 0.001 * direction**2
        return w - 0.01 * (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)


BASES = {'SGD': SGD, 'AdamW': AdamW}

"""A small network, samples for it, and a loss that fails at a given call."""

from __future__ import annotations

import os
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from composer_sam.landscapes.subspaces import Around, grid_axis, random_directions

__all__ = ['Counted', 'Network', 'around', 'axes', 'cross_entropy', 'data', 'network']

cross_entropy = nn.functional.cross_entropy


class Network(nn.Sequential):
    """A convolution with BatchNorm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 5)
        )

    @property
    def convolution(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self[0])

    @property
    def norm(self) -> nn.BatchNorm2d:
        return cast(nn.BatchNorm2d, self[1])

    @property
    def linear(self) -> nn.Linear:
        return cast(nn.Linear, self[5])


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    model = Network()
    for _ in range(3):  # the running statistics depend on the seed
        model(2 * torch.randn(8, 1, 6, 6) + seed)
    return model


def data(seed: int = 7) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 1, 6, 6, generator=generator), torch.randint(5, (n,), generator=generator)) for n in (9, 4)]


def around(model: nn.Module, dims: int = 2, seed: int = 0) -> Around:
    return Around.of(model, random_directions(model, seed, dims), ['u', 'v'][:dims], 'here')


def axes(resolution: int, dims: int = 2, reach: float = 1.0) -> list[np.ndarray]:
    return [grid_axis(-reach, reach, resolution)] * dims


class Counted:
    """A loss that counts its calls and raises at call ``fail_at``, or with ``leave`` ends the process there."""

    def __init__(self, fail_at: int = 0, leave: bool = False) -> None:
        self.calls, self.fail_at, self.leave = 0, fail_at, leave

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            if self.leave:
                os._exit(1)
            raise RuntimeError('injected')
        return cross_entropy(outputs, targets)

"""A network and data of one's own, which examples/own.yaml names."""

from __future__ import annotations

import torch
from sklearn.datasets import load_wine
from torch import nn
from torch.utils.data import TensorDataset


def wines(test: float = 0.25, seed: int = 0) -> tuple[TensorDataset, TensorDataset, int]:
    """Return training and test data, and the number of classes: 13 numbers about a wine, and its grower."""
    measured, growers = load_wine(return_X_y=True)
    x, y = torch.tensor(measured, dtype=torch.float32), torch.tensor(growers)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    few = round(test * len(x))
    train, held_out = order[few:], order[:few]
    x = (x - x[train].mean(0)) / x[train].std(0)
    return TensorDataset(x[train], y[train]), TensorDataset(x[held_out], y[held_out]), 3


def network(image_shape: tuple[int, ...], num_classes: int, width: int = 32) -> nn.Module:
    """Return a network that maps a batch to a score per class."""
    (features,) = image_shape
    return nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, num_classes))

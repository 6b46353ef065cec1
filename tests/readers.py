"""What the readers of an example have, and the example does not make."""

from __future__ import annotations

from typing import Any

import torch
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def stand_ins(block: str) -> dict[str, Any]:
    """Return a network of images, an optimizer, a batch of data and a loss, by their names in examples."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    data = TensorDataset(torch.randn(16, 1, 8, 8), torch.randint(10, (16,)))
    return {
        # A Trainer takes a model of Composer's, a loop of one's own any network.
        'model': ComposerClassifier(network, num_classes=10) if 'Trainer(' in block else network,
        'optimizer': torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
        'loader': DataLoader(data, batch_size=16),
        'loss_fn': nn.functional.cross_entropy,
        'torch': torch,
    }

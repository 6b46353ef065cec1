"""The data of most of these examples: scikit-learn's handwritten digits, with wrong training labels. No download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset


def noisy_digits(wrong: float = 0.4) -> tuple[TensorDataset, TensorDataset]:
    """Return 1,347 training and 450 test images of 1 x 8 x 8 pixels; ``wrong`` of the training labels are wrong.

    A network can memorise wrong labels, and then it is less accurate on the test images, whose labels are all right.
    SAM makes that harder, so its effect shows on a small network within seconds.
    """
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16  # pixels are integers from 0 to 16
    labels = torch.tensor(digits)
    generator = torch.Generator().manual_seed(0)  # the same split and the same wrong labels in every run
    order = torch.randperm(len(images), generator=generator)
    test, train = order[:450], order[450:]
    labels_of_training = labels[train]
    changed = torch.rand(len(train), generator=generator) < wrong
    to_another = torch.randint(1, 10, (len(train),), generator=generator)  # 1 to 9 digits further: never the right one
    labels_of_training = torch.where(changed, (labels_of_training + to_another) % 10, labels_of_training)
    return TensorDataset(images[train], labels_of_training), TensorDataset(images[test], labels[test])

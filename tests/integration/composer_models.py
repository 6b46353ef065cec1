"""Tiny models and data for Composer's algorithms: for each kind of layer and batch one of them wants."""

from __future__ import annotations

import functools

import torch
from composer.models import ComposerClassifier, ComposerModel
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import FakeData
from torchvision.models.resnet import Bottleneck
from torchvision.transforms import ToTensor

__all__ = [
    'BATCH',
    'PER_EPOCH',
    'Sentences',
    'convolutional',
    'digits',
    'dropping',
    'language',
    'normalised',
    'pictures',
    'residual',
    'yes_or_no',
]

BATCH, PER_EPOCH = 15, 3
COUNT = BATCH * PER_EPOCH


@functools.cache
def digits() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(images[:COUNT], dtype=torch.float32).reshape(COUNT, 1, 8, 8) / 16
    return TensorDataset(images, torch.as_tensor(labels[:COUNT]))


def yes_or_no() -> Dataset:
    """Images of two classes, which is all that NoOpModel's metric knows."""
    images, labels = digits().tensors
    return TensorDataset(images, labels % 2)


def pictures() -> Dataset:
    return FakeData(COUNT, image_size=(3, 8, 8), num_classes=10, transform=ToTensor())


class Sentences(Dataset):
    """Made-up token sequences to be guessed back."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(1, 30, (COUNT, 16), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        return {'input_ids': tokens, 'attention_mask': torch.ones_like(tokens), 'labels': tokens}


def classifier(*modules: nn.Module) -> ComposerModel:
    return ComposerClassifier(nn.Sequential(*modules), num_classes=10)


def convolutional(channels: int = 1) -> ComposerModel:
    return classifier(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def residual() -> ComposerModel:
    blocks = [Bottleneck(8, 2) for _ in range(3)]
    return classifier(nn.Conv2d(1, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def dropping() -> ComposerModel:
    return classifier(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 10))


class _InBfloat16(nn.Sequential):
    """What ``amp_bf16`` does on a GPU: on the CPU the Trainer knows no autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast('cpu', dtype=torch.bfloat16):
            return super().forward(input)


def normalised(norm: nn.Module) -> ComposerModel:
    return classifier(_InBfloat16(nn.Flatten(), nn.Linear(64, 12), norm, nn.ReLU(), nn.Linear(12, 10)))


def language() -> ComposerModel:
    from composer.models import HuggingFaceModel
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        attn_implementation='eager',
    )
    return HuggingFaceModel(BertForMaskedLM(config))

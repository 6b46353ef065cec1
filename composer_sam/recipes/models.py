"""The networks that a recipe can name, as Composer models."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from composer.metrics import CrossEntropy
from composer.models import ComposerClassifier
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from composer_sam.recipes.errors import RecipeError
from composer_sam.recipes.own import own_model
from composer_sam.recipes.schema import CNN, MLP, ModelSection, OwnModel, WideResNet

__all__ = ['WideResidualNetwork', 'build_model', 'cifar_resnet', 'plain_models']

_CIFAR_RESNETS = {f'cifar_resnet{depth}': f'resnet{depth}' for depth in (18, 34, 50)}
# In training mode these return the outputs of auxiliary classifiers too, unless they are switched off.
_WITHOUT_AUXILIARY = {name: {'aux_logits': False, 'init_weights': True} for name in ('googlenet', 'inception_v3')}


def plain_models() -> list[str]:
    """Return the names of the models without options: ResNets with a CIFAR stem and torchvision's classifiers."""
    return [*_CIFAR_RESNETS, *torchvision.models.list_models(module=torchvision.models)]


def build_model(section: ModelSection, image_shape: tuple[int, ...], num_classes: int) -> ComposerClassifier:
    """Build the network of the section ``model`` of a recipe.

    The weights are drawn from torch's global random stream, which must be seeded before.

    Args:
        section: the section.
        image_shape: the channels, height and width of an image; the shape of a sample of another kind.
        num_classes: the number of classes.

    Raises:
        RecipeError: the network does not take samples of this shape.
    """
    if isinstance(section, MLP):
        module = mlp([math.prod(image_shape), *section.hidden, num_classes])
    elif isinstance(section, OwnModel):
        module = own_model(section, image_shape, num_classes)
    elif len(image_shape) != 3:
        raise RecipeError(
            f'model.name: {section.name!r} takes images (channels, height, width), the data has samples of shape '
            f'{image_shape}; choose mlp, or a function of your own'
        )
    else:
        module = _for_images(section, image_shape[0], num_classes)
    # Composer's FSDP shards the marked modules only.
    for child in module.children():
        if any(True for _ in child.parameters()):
            child._fsdp_wrap = True  # pyright: ignore[reportArgumentType]
    accuracy = partial(MulticlassAccuracy, num_classes=num_classes, average='micro')
    return ComposerClassifier(
        module,
        num_classes=num_classes,
        train_metrics=MetricCollection([accuracy()]),
        val_metrics=MetricCollection([CrossEntropy(), accuracy()]),
    )


def _for_images(section: ModelSection, channels: int, num_classes: int) -> nn.Module:
    if isinstance(section, CNN):
        return cnn(channels, section.width, num_classes)
    if isinstance(section, WideResNet):
        return WideResidualNetwork(channels, num_classes, section.depth, section.widen, section.dropout)
    if section.name in _CIFAR_RESNETS:
        return cifar_resnet(_CIFAR_RESNETS[section.name], channels, num_classes)
    if channels != 3:
        raise RecipeError(f'model.name: {section.name!r} takes images of 3 channels, the data has {channels}')
    extra: dict[str, Any] = _WITHOUT_AUXILIARY.get(section.name, {})
    return torchvision.models.get_model(section.name, weights=None, num_classes=num_classes, **extra)


def mlp(widths: list[int]) -> nn.Sequential:
    """Return linear layers of the given widths, from input to output, with ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: int, width: int, num_classes: int) -> nn.Sequential:
    """Return a network of two 3x3 convolutions with BatchNorm and pooling, for small images."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, num_classes),
    )


def cifar_resnet(name: str, channels: int, num_classes: int) -> nn.Module:
    """Return torchvision's ResNet with a stem for 32x32 images: a 3x3 convolution of stride 1 and no pooling."""
    module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    module.conv1 = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(module.conv1.weight, mode='fan_out', nonlinearity='relu')
    module.maxpool = nn.Identity()
    return module


class _WideBlock(nn.Module):
    """A residual block: BatchNorm, ReLU and convolution, twice, with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, inputs: Tensor) -> Tensor:
        activated = F.relu(self.norm1(inputs))
        shortcut = inputs if self.shortcut is None else self.shortcut(activated)
        residual = self.conv1(activated)
        return self.conv2(self.dropout(F.relu(self.norm2(residual)))) + shortcut


class WideResidualNetwork(nn.Module):
    """The wide residual network for 32x32 images.

    Args:
        channels: the number of channels of an image.
        num_classes: the number of classes.
        depth: the number of convolutions on the longest path, 4 + 6 times the number of blocks of a stage.
        widen: the factor by which it is wider than the original residual network.
        dropout: the probability of dropout between the two convolutions of a block.

    Reference:
        Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, https://arxiv.org/abs/1605.07146
    """

    def __init__(self, channels: int, num_classes: int, depth: int = 28, widen: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        stages = []
        for inputs, outputs, stride in zip(widths[:-1], widths[1:], (1, 2, 2), strict=True):
            blocks = [_WideBlock(inputs, outputs, stride, dropout)]
            blocks += [_WideBlock(outputs, outputs, 1, dropout) for _ in range((depth - 4) // 6 - 1)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.stages(self.stem(images))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(features, 1), 1))

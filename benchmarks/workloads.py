"""The models, batches, cheap closures and Trainers of the benchmarks."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torchvision
from composer import Callback, Logger, State, Trainer
from composer.models import ComposerClassifier
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer

import composer_sam.engine.placement
from composer_sam.recipes.models import mlp

__all__ = [
    'BASES',
    'Batches',
    'Clock',
    'cifar_resnet18',
    'digits_batches',
    'digits_mlp',
    'forced_placement',
    'gradient_closure',
    'make_trainer',
    'network',
    'small_vit',
]

warnings.filterwarnings('ignore', message='SAM has known issues')
warnings.filterwarnings('ignore', message='.*device_train_microbatch_size')

BASES: dict[str, Callable[[Sequence[Tensor]], Optimizer]] = {
    'SGD': functools.partial(torch.optim.SGD, lr=1e-6, momentum=0.9, weight_decay=5e-4),
    'AdamW': functools.partial(torch.optim.AdamW, lr=1e-6, weight_decay=0.05),
}


def cifar_resnet18(num_classes: int = 10) -> nn.Module:
    """Return ResNet-18 with the 3x3 stem for 32x32 images."""
    net = torchvision.models.resnet18(num_classes=num_classes)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return net


def network(device: torch.device) -> nn.Module:
    """Return ResNet-18 on a GPU, and elsewhere a small network, so that a script for GPUs can be tried in seconds."""
    if device.type == 'cuda':
        return cifar_resnet18().to(device)
    layers = {'conv': nn.Conv2d(3, 8, 3), 'bn': nn.BatchNorm2d(8), 'relu': nn.ReLU(), 'pool': nn.AdaptiveAvgPool2d(2)}
    return nn.Sequential(OrderedDict(layers, flatten=nn.Flatten(), fc=nn.Linear(32, 10)))


def digits_mlp() -> nn.Module:
    """Return the MLP of the digits recipes."""
    return mlp([64, 256, 256, 10])


def small_vit() -> nn.Module:
    """Return a vision transformer for 32x32 images: 64 patches, 2.7 million parameters."""
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=10
    )


class Batches(list):
    """Batches in the device's memory, so that loading costs nothing."""

    def __init__(self, batch_size: int, count: int, shape: tuple[int, ...], device: torch.device, **layout: Any):
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            images = torch.randn(batch_size, *shape, generator=generator).to(device, **layout)
            self.append((images, torch.randint(10, (batch_size,), generator=generator).to(device)))
        self.batch_size = batch_size


def digits_batches(batch_size: int, count: int) -> Batches:
    """Return the first batches of scikit-learn's handwritten digits."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.as_tensor(images, dtype=torch.float32).div(16).reshape(-1, 1, 8, 8)
    batches = Batches(batch_size, 0, (), torch.device('cpu'))
    batches.extend(
        zip(pixels.split(batch_size)[:count], torch.as_tensor(labels).split(batch_size)[:count], strict=True)
    )
    return batches


class Clock(Callback):
    """Times the steps of a Trainer.

    Args:
        device: drained before the time is read.
        every_step: one entry of ``seconds`` per step, and the loss of each in ``losses``; otherwise one per
            :meth:`chunk`, its mean, so that the device is drained at a chunk's ends only.
    """

    def __init__(self, device: torch.device, every_step: bool = True):
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._device = device
        self._every_step = every_step
        self._first = self._last = -1
        self._begin = 0.0

    def batch_start(self, state: State, logger: Logger) -> None:
        del logger
        if self._every_step or state.timestamp.batch.value == self._first:
            self._begin = self._now()

    def batch_end(self, state: State, logger: Logger) -> None:
        del logger
        if self._every_step:
            self.seconds.append(self._now() - self._begin)
            self.losses.append(torch.as_tensor(state.loss).detach().item())
        elif state.timestamp.batch.value == self._last:  # counted up before this event
            self.seconds.append((self._now() - self._begin) / (self._last - self._first))

    def chunk(self, trainer: Trainer, steps: int, counted: bool = True) -> None:
        """Train for ``steps`` steps, timed as one."""
        self._first = trainer.state.timestamp.batch.value
        self._last = self._first + steps
        trainer.fit(duration=f'{steps}ba')
        if not counted:
            self.seconds.pop()

    def _now(self) -> float:
        if self._device.type == 'cuda':
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def make_trainer(
    net: nn.Module,
    batches: Batches,
    algorithms: Sequence[Any] = (),
    lr: float = 0.01,
    device: torch.device | None = None,
    **options: Any,
) -> Trainer:
    """Return a Trainer that only trains: no progress bar, console, evaluation or checkpoints."""
    on_gpu = device is not None and device.type == 'cuda'
    model = ComposerClassifier(net, num_classes=10)
    return Trainer(
        model=model,
        train_dataloader=batches,
        optimizers=torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4),
        algorithms=list(algorithms),
        max_duration='1000000ba',
        device='gpu' if on_gpu else 'cpu',
        progress_bar=False,
        log_to_console=False,
        **{'precision': 'fp32', **options},
    )


def gradient_closure(parameters: Sequence[Tensor], optimizer: Optimizer) -> Callable[..., Tensor]:
    """A closure as cheap as one can be that is still a real backward: autograd allocates every gradient anew and
    writes each element once. It takes the arguments of Composer's closure."""
    templates = [torch.randn_like(parameter) * 1e-3 for parameter in parameters]

    class Emit(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            del ctx
            return inputs[0].new_ones(())

        @staticmethod
        def backward(ctx: Any, *outputs: Tensor) -> Any:
            del ctx, outputs
            return tuple(template.clone() for template in templates)

    def closure(loss_dict: dict[str, Tensor] | None = None, ddp_sync: bool = True) -> Tensor:
        del loss_dict, ddp_sync
        optimizer.zero_grad(set_to_none=True)
        loss = Emit.apply(*parameters)
        loss.backward()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        return loss  # pyright: ignore[reportReturnType]

    return closure


@contextlib.contextmanager
def forced_placement(placement: str) -> Iterator[None]:
    """``'copy'`` or ``'exchange'`` on every device; ``'default'`` is what the engine chooses."""
    places: Any = composer_sam.engine.placement
    original = places.exchangeable
    if placement != 'default':
        places.exchangeable = lambda parameter: placement == 'exchange'
    try:
        yield
    finally:
        places.exchangeable = original

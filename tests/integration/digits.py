"""A small run of the real Trainer on real digits, which records all that a repeated pass could disturb."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from composer import Callback, DataSpec, Trainer
from composer.core import State, Timestamp
from composer.loggers import InMemoryLogger, Logger
from composer.models import ComposerClassifier
from composer.utils import dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchmetrics import Metric

from composer_sam import registry
from tests.problems import numpy_stream

__all__ = [
    'BATCH',
    'METHODS',
    'PER_EPOCH',
    'Digits',
    'MaskedDropout',
    'Recorder',
    'Samples',
    'build',
    'logged_by',
    'streams',
    'weights',
]

METHODS = list(registry)
BATCH = 16
PER_EPOCH = 4


class Digits(Dataset):
    """The first digits, each augmented by draws from all three global random streams."""

    def __init__(self, augment: bool = True):
        images, labels = load_digits(return_X_y=True)
        count = BATCH * PER_EPOCH
        self.images = torch.as_tensor(images[:count], dtype=torch.float32) / 16
        self.labels = torch.as_tensor(labels[:count])
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if self.augment:
            shift = random.randint(-1, 1)
            noise = 0.1 * torch.randn(64) + 0.1 * torch.as_tensor(np.random.rand(64), dtype=torch.float32)
            image = image.roll(shift) + noise
        return image, self.labels[index]


class Notes:
    """Masks that were seen; of a class of its own, because lists in attributes are put back between passes."""

    def __init__(self) -> None:
        self.masks: list[Tensor] = []


class MaskedDropout(nn.Dropout):
    """Dropout that remembers the mask of every forward in training."""

    def __init__(self, p: float):
        super().__init__(p)
        self.notes = Notes()

    def forward(self, input: Tensor) -> Tensor:
        mask = super().forward(torch.ones_like(input))
        if self.training:
            self.notes.masks.append(mask.detach().clone())
        return input * mask


class Samples(Metric):
    """Counts the samples it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state('total', default=torch.tensor(0), dist_reduce_fx='sum')

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        del targets
        self.total += len(outputs)

    def compute(self) -> Tensor:
        return self.total


class Recorder(Callback):
    """What happened in each batch: a list entry per batch, and in it one per pass where the event is fired per pass.

    ``fault`` is called before every forward with the batch's number and the pass's, and may raise.
    """

    def __init__(self, fault: Callable[[int, int, State], None] | None = None):
        self.fault = fault
        self.drawn: list[list[Tensor]] = []
        self.inputs: list[list[list[Tensor]]] = []
        self.losses: list[list[float]] = []
        self.outputs: list[list[Tensor]] = []
        self.shown: list[tuple[float, Tensor]] = []
        self.batches_at_end: list[list[Tensor]] = []
        self.samples: list[int] = []
        self.lr: list[float] = []
        self.before: dict[str, Any] = {}

    def batch_start(self, state: State, logger: Logger) -> None:
        del logger
        self.drawn.append([item.clone() for item in state.batch])
        self.inputs.append([])
        self.losses.append([])
        self.outputs.append([])
        self.before = snapshot(state)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        del state, logger
        self.inputs[-1].append([])

    def before_forward(self, state: State, logger: Logger) -> None:
        del logger
        self.inputs[-1][-1] += [item.clone() for item in state.batch]
        if self.fault is not None:
            self.fault(len(self.inputs), len(self.inputs[-1]), state)

    def after_forward(self, state: State, logger: Logger) -> None:
        del logger
        self.outputs[-1].append(_tensor(state.outputs).detach().clone())

    def after_loss(self, state: State, logger: Logger) -> None:
        del logger
        self.losses[-1].append(float(_tensor(state.loss)))

    def batch_end(self, state: State, logger: Logger) -> None:
        del logger
        self.shown.append((float(_tensor(state.loss)), _tensor(state.outputs).detach().clone()))
        self.batches_at_end.append([item.clone() for item in state.batch])
        self.lr.append(state.optimizers[0].param_groups[0]['lr'])
        metrics = state.train_metrics or {}
        if 'Samples' in metrics:
            self.samples.append(int(metrics['Samples'].compute()))

    @property
    def passes(self) -> list[int]:
        return [len(of_batch) for of_batch in self.inputs]


def _tensor(value: object) -> Tensor:
    """A loss, or outputs, of a model that has one of them."""
    assert isinstance(value, Tensor)
    return value


def logged_by(trainer: Trainer) -> dict[str, list[tuple[Timestamp, Any]]]:
    """Under each key when something was logged, and what."""
    (logger,) = trainer.logger.destinations
    assert isinstance(logger, InMemoryLogger)
    return logger.data


def snapshot(state: State) -> dict[str, Any]:
    """All a step changes."""
    return copy.deepcopy(
        {
            'model': dict(state.model.state_dict()),
            'optimizer': state.optimizers[0].state_dict(),
            'random': streams(),
            'batch': state.timestamp.batch.value,
        }
    )


def streams() -> tuple[Any, ...]:
    return random.getstate(), numpy_stream(), torch.get_rng_state()


def network(dropout: float = 0.3) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), MaskedDropout(dropout), nn.Linear(24, 10))


def build(
    *algorithms: Any,
    recorder: Callback | None = None,
    optimizer: str = 'SGD',
    microbatch: int | None = None,
    microbatch_transform: Callable[[Any], Any] | None = None,
    augment: bool = True,
    resumable: bool = False,
    **settings: Any,
) -> Trainer:
    """A Trainer of two epochs of four batches, from the same random numbers every time.

    The data is shuffled by the global stream, or where the run is to be ``resumable`` as Composer wants it then: by a
    sampler that depends on the epoch's number only.
    """
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    model = ComposerClassifier(network(), num_classes=10, train_metrics=Samples())
    lr = {'SGD': {'lr': 0.1, 'momentum': 0.9, 'weight_decay': 1e-3}, 'AdamW': {'lr': 0.01}}[optimizer]
    data = Digits(augment)
    sampler = dist.get_sampler(data, shuffle=True) if resumable else RandomSampler(data)
    loader = DataLoader(data, batch_size=BATCH, sampler=sampler)
    return Trainer(
        model=model,
        train_dataloader=DataSpec(loader, microbatch_transforms=microbatch_transform),
        optimizers=getattr(torch.optim, optimizer)(model.parameters(), **lr),
        algorithms=list(algorithms),
        callbacks=[] if recorder is None else [recorder],
        loggers=[InMemoryLogger()],
        device='cpu',
        device_train_microbatch_size=microbatch,
        **{'max_duration': '2ep', 'seed': 11, 'progress_bar': False, **settings},
    )


def weights(trainer: Trainer) -> Tensor:
    """All weights and buffers as one vector."""
    return torch.cat([value.detach().double().reshape(-1) for value in trainer.state.model.state_dict().values()])

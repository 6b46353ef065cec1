"""The Composer Trainer on two ranks that the tests share: digits, and what each rank was given."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from composer import Callback, Trainer
from composer.core import State
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import FSDP2Config
from composer.utils import dist as composer_dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ['BATCHES', 'FSDP2', 'PER_RANK', 'Digits', 'Drawn', 'data', 'fit']

OPTIMIZERS = {
    'SGD': lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    'AdamW': lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}
PER_RANK = 8
BATCHES = 8
# Composer takes FSDP2 under the key 'fsdp'; it ignores 'fsdp2' without a word and trains unsharded.
FSDP2: dict[str, Any] = {'parallelism_config': {'fsdp': FSDP2Config()}}


class Digits(ComposerModel):
    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.first = nn.Linear(64, 11)
            self.norm = nn.BatchNorm1d(11) if batch_norm else nn.Identity()
            self.last = nn.Linear(11, 10)
        for layer in (self.first, self.last):
            vars(layer)['_fsdp_wrap'] = True  # Composer shards it by itself

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(batch[0]))))

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


class Drawn(Callback):
    """The batches this rank was given, and the number of passes over each."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.passes: list[int] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        del logger
        self.batches.append(tuple(item.clone() for item in state.batch))
        self.passes.append(0)

    def before_forward(self, state: State, logger: Logger) -> None:
        del state, logger
        self.passes[-1] += 1


def data() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    count = BATCHES * PER_RANK * dist.get_world_size() // 2
    return TensorDataset(torch.as_tensor(images[:count], dtype=torch.float32) / 16, torch.as_tensor(labels[:count]))


def fit(
    *algorithms: Any,
    model: ComposerModel | None = None,
    optimizer: str = 'SGD',
    callbacks: tuple[Callback, ...] = (),
    **settings: Any,
) -> tuple[Trainer, Drawn]:
    """Two epochs of four batches per rank."""
    model = Digits() if model is None else model
    samples, drawn = data(), Drawn()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(
            samples, batch_size=PER_RANK, sampler=composer_dist.get_sampler(samples, shuffle=True, drop_last=True)
        ),
        optimizers=OPTIMIZERS[optimizer](model.parameters()),
        algorithms=list(algorithms),
        callbacks=[drawn, *callbacks],
        device='cpu',
        seed=3,
        progress_bar=False,
        **{'max_duration': '2ep', **settings},
    )
    trainer.fit()
    return trainer, drawn

"""What the launcher runs: SAM through Composer on this many ranks, its final weights written by rank 0.

composer -n 2 tests/gpu/launched.py fsdp1 OUT       # or ddp, fsdp2
python tests/gpu/launched.py alone OUT --world 2    # one process on the union of the ranks' batches
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from composer import Trainer
from composer.models import ComposerModel
from composer.utils import FSDP2Config
from composer.utils import dist as composer_dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from tests.problems import made

BATCH = 8
STEPS = 12
WRAPPERS: dict[str, dict[str, Any]] = {
    'alone': {},
    'ddp': {},
    'fsdp1': {'parallelism_config': {'fsdp': {'sharding_strategy': 'FULL_SHARD', 'mixed_precision': 'FULL'}}},
    'fsdp2': {'parallelism_config': {'fsdp': FSDP2Config()}},
}


class Digits(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Linear(64, 16)
        self.last = nn.Linear(16, 10)
        for layer in (self.first, self.last):
            vars(layer)['_fsdp_wrap'] = True  # Composer shards it by itself

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.last(torch.tanh(self.first(batch[0])))

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


def whole(model: nn.Module) -> Tensor:
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters() if p.numel()])
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in parts])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('wrapper', choices=list(WRAPPERS))
    parser.add_argument('out')
    parser.add_argument('--world', type=int, default=1)
    parser.add_argument('--method', default='SAM')
    parser.add_argument('--device', default='gpu')
    options = parser.parse_args()
    os.environ['FSDP_VERSION'] = '2' if options.wrapper == 'fsdp2' else '1'
    composer_dist.initialize_dist(options.device)
    world = composer_dist.get_world_size() * options.world
    images, labels = load_digits(return_X_y=True)
    count = BATCH * STEPS * world
    data = TensorDataset(torch.as_tensor(images[:count], dtype=torch.float32) / 16, torch.as_tensor(labels[:count]))
    model = Digits()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(
            data, batch_size=BATCH * options.world, sampler=composer_dist.get_sampler(data, shuffle=False)
        ),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        algorithms=[made(options.method, sync_first_pass=True, interval=2)],
        device=options.device,
        max_duration='1ep',
        precision='fp32',
        progress_bar=False,
        **WRAPPERS[options.wrapper],
    )
    trainer.fit()
    weights = whole(trainer.state.model).cpu()
    if composer_dist.get_global_rank() == 0:
        torch.save(weights, options.out)


if __name__ == '__main__':
    main()

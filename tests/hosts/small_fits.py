"""Small fits of Lightning, and the same by a plain loop over passes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from composer_sam import SharpnessAwareOptimizer
from composer_sam.methods.base import SharpnessAware as MethodOfComposerSAM
from composer_sam.trainers.lightning import SharpnessAware
from tests.conformance.parts import CLIP, by_passes, loss_of
from tests.problems import BASES, network, same

__all__ = [
    'Batch',
    'Loader',
    'Module',
    'Numbers',
    'assert_detached',
    'assert_same_run',
    'by_passes',
    'fitted',
    'half',
    'parameters_of',
    'scaled',
    'state_of',
    'trainer',
    'wrapped',
]

Batch = tuple[Tensor, Tensor]


class Loader:
    """Batches that are ready; ``before`` is called when one is loaded."""

    def __init__(self, data: Sequence[Batch], before: Callable[[], object] = lambda: None):
        self.data, self.before = data, before

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.data:
            self.before()
            yield batch


class Module(pl.LightningModule):
    """A module as a user writes it, and the losses that Lightning hands to callbacks."""

    def __init__(self, base: str = 'SGD', seed: int = 3, dropout: float = 0.25):
        super().__init__()
        self.net = network(dropout=dropout)
        self.base, self.seed = base, seed
        self.notes = SimpleNamespace(losses=[], forwards=0, stream=None)  # of a class that is not put back

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.notes.forwards += 1
        return loss_of(self, batch)

    def configure_optimizers(self) -> Any:
        return BASES[self.base](self.net.parameters())

    def on_train_start(self) -> None:
        torch.manual_seed(self.seed)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.notes.losses.append(outputs['loss'] if outputs else None)

    def on_train_end(self) -> None:
        self.notes.stream = torch.get_rng_state()


class Numbers(Logger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return 'numbers'

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def of(self, name: str) -> list[float]:
        return [row[name] for _, row in self.rows if name in row]


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            'accelerator': 'cpu',
            'devices': 1,
            'callbacks': list(callbacks),
            'default_root_dir': folder,
            'enable_checkpointing': any(isinstance(callback, Checkpoint) for callback in callbacks),
            'enable_model_summary': False,
            'enable_progress_bar': False,
            'gradient_clip_val': CLIP,
            'logger': False,
            'max_epochs': 1,
            **options,
        }
    )


def fitted(
    folder: Path, method: MethodOfComposerSAM, data: Any, module: Module | None = None, **options: Any
) -> tuple[Module, SharpnessAware, pl.Trainer]:
    """A module after a fit with the method, with the callback and the Trainer."""
    module = Module() if module is None else module
    callback = SharpnessAware(method)
    run = trainer(folder, callback, *options.pop('callbacks', ()), **options)
    run.fit(module, data if isinstance(data, Loader) else Loader(data))
    return module, callback, run


def wrapped(callback: SharpnessAware) -> SharpnessAwareOptimizer:
    assert callback.optimizer is not None
    return callback.optimizer


def parameters_of(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def state_of(optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy(optimizer.state_dict())


def assert_same_run(
    folder: Path, method: MethodOfComposerSAM, data: Sequence[Batch], accumulate: int = 1, base: str = 'SGD'
) -> None:
    model, optimizer, losses = by_passes(method, data, accumulate, base)
    end = torch.get_rng_state()
    module, callback, _ = fitted(folder, method, data, Module(base), accumulate_grad_batches=accumulate)
    assert same(module.net.state_dict(), model.state_dict())
    assert same(wrapped(callback).state_dict(), optimizer.state_dict())
    assert same(module.notes.losses, losses)
    assert torch.equal(module.notes.stream, end)
    assert wrapped(callback).steps_perturbed == optimizer.steps_perturbed > 0


def assert_detached(callback: SharpnessAware, run: pl.Trainer) -> None:
    assert not {'training_step', 'backward', 'optimizer_step'} & vars(run.strategy).keys()
    assert not {'log', 'log_dict'} & vars(run.lightning_module).keys()
    assert all(optimizer is wrapped(callback).base_optimizer for optimizer in run.optimizers)


def half(scale: float) -> MixedPrecision:
    return MixedPrecision('16-mixed', 'cpu', torch.amp.GradScaler('cpu', init_scale=scale, growth_interval=2))


class _Unrounded(MixedPrecision):
    """A plugin with a scaler, and no fp16."""

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast('cpu', enabled=False)


def scaled(scale: float) -> MixedPrecision:
    return _Unrounded('16-mixed', 'cpu', torch.amp.GradScaler('cpu', init_scale=scale))

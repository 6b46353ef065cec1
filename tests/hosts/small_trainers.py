"""Small runs of transformers' Trainer, and the same by a plain loop over passes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from composer_sam import SharpnessAwareOptimizer
from composer_sam.methods.base import SharpnessAware
from composer_sam.trainers.transformers import SharpnessAwareTrainer
from tests.problems import BASES, batches, network, same

__all__ = [
    'CLIP',
    'At',
    'Classifier',
    'Inputs',
    'RandomPlaces',
    'arguments',
    'assert_same_run',
    'base_of',
    'by_passes',
    'counts_shifted_labels',
    'fresh_accelerate',
    'in_order',
    'language_model',
    'major_version',
    'samples',
    'sentences',
    'shrinks_by_its_window',
    'state_of',
    'trainer_of',
]

Inputs = dict[str, Tensor]
CLIP = 0.05
SIZE = 12  # of a micro-batch


class Classifier(nn.Module):
    """A model as the Trainer wants it, with BatchNorm and dropout. ``forwards`` are those in training mode.

    Args:
        fail_at: the number of the forward that fails, from 1.
        fault: what it raises.
    """

    def __init__(self, dropout: float = 0.25, seed: int = 0):
        super().__init__()
        self.layers = network(dropout=dropout, seed=seed)
        self.counted = Counted()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.counted.count(self.training)
        logits = self.layers(x)
        return (
            {'logits': logits}
            if labels is None
            else {'loss': nn.functional.cross_entropy(logits, labels), 'logits': logits}
        )


class Counted:
    """Counts forwards, and makes one fail. No plain number, which would be put back between passes."""

    def __init__(self) -> None:
        self.forwards = 0
        self.fail_at = -1
        self.fault: BaseException = MemoryError('no memory')

    def count(self, training: bool) -> None:
        self.forwards += training
        if training and self.forwards == self.fail_at:
            raise self.fault


class At(TrainerCallback):
    """Calls a function at an event, with the Trainer's state and control."""

    def __init__(self, event: str, function: Callable[[Any, Any], object]):
        def called(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            function(state, control)

        setattr(self, event, called)


class RandomPlaces(TrainerCallback):
    """Notes where torch's random stream is when the first step of every epoch begins."""

    def __init__(self) -> None:
        self.places: list[Tensor] = []
        self._due = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._due = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._due:
            self.places.append(torch.get_rng_state())
        self._due = False


def language_model(dropout: float = 0.1) -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        probabilities = dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), dropout)
        config = GPT2Config(
            vocab_size=29,
            n_positions=12,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            **probabilities,
        )
        return GPT2LMHeadModel(config)


def sentences(count: int) -> list[Inputs]:
    """Tokens, of which a different number in every sentence has no label."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(1, 29, (count, 9), generator=generator)
    labels = tokens.clone()
    for number, row in enumerate(labels):
        row[: 2 + number % 6] = -100
    return [{'input_ids': row, 'labels': label} for row, label in zip(tokens, labels, strict=True)]


@contextlib.contextmanager
def fresh_accelerate() -> Generator[None]:
    """Put back what Accelerate keeps in classes, and what TrainingArguments writes into the environment for it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith('ACCELERATE_')]:
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if name.startswith('ACCELERATE_')})
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def samples(steps: int, seed: int = 1) -> list[Inputs]:
    """The samples of so many micro-batches."""
    return [
        {'x': x, 'labels': y} for xs, ys in batches(steps, size=SIZE, seed=seed) for x, y in zip(xs, ys, strict=True)
    ]


def micro_batches(data: Sequence[Inputs]) -> list[Inputs]:
    """The samples in their order, as the Trainer's collator joins them."""
    rows = [data[first : first + SIZE] for first in range(0, len(data), SIZE)]
    return [{name: torch.stack([sample[name] for sample in row]) for name in row[0]} for row in rows]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    quiet: dict[str, Any] = {
        'use_cpu': True,
        'report_to': [],
        'disable_tqdm': True,
        'dataloader_pin_memory': False,
        'save_strategy': 'no',
        'logging_strategy': 'no',
        'lr_scheduler_type': 'constant',
        'per_device_train_batch_size': SIZE,
        'per_device_eval_batch_size': SIZE,
        'num_train_epochs': 1,
        'max_grad_norm': CLIP,
    }
    return TrainingArguments(str(folder), **{**quiet, **options})


def in_order(kind: type[Trainer]) -> type[Any]:
    """The class of Trainers that do not shuffle."""

    class InOrder(kind):
        def _get_train_sampler(self, *_: Any) -> Any:
            data: Any = self.train_dataset
            return torch.utils.data.SequentialSampler(data)

    return InOrder


def trainer_of(
    method: SharpnessAware | None,
    args: TrainingArguments,
    data: Any,
    model: nn.Module | None = None,
    base: str = 'SGD',
    kind: type[Any] | None = None,
    **options: Any,
) -> Any:
    """A Trainer of the small classifier, with the method or without one."""
    model = Classifier() if model is None else model
    kind = kind or in_order(Trainer if method is None else SharpnessAwareTrainer)
    options = {'optimizers': (BASES[base](model.parameters()), None), **options}
    if method is not None:
        options['method'] = method
    trainer = kind(model=model, args=args, train_dataset=data, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def base_of(model: nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer that a Trainer makes for a model."""
    made: Any = Trainer(model, args).create_optimizer()
    return made


def shrinks_by_its_window() -> bool:
    """Whether the Trainer divides the loss by the number of micro-batches that a step has, instead of the most."""
    return 'current_gradient_accumulation_steps' in inspect.getsource(Trainer.training_step)


def counts_shifted_labels() -> bool:
    """Whether the Trainer counts the tokens of a language model without the first of every sample."""
    return '_loss_shifts_labels' in inspect.getsource(Trainer)


def major_version() -> int:
    return int(transformers.__version__.split('.')[0])


def by_passes(
    method: SharpnessAware,
    model: nn.Module,
    windows: Sequence[Sequence[Any]],
    accumulate: int,
    base: torch.optim.Optimizer,
    clip: float = CLIP,
    loss_of: Callable[[nn.Module, Any, Sequence[Any]], Tensor] | None = None,
    cut: Callable[[Any, Any], Any] = lambda number, inputs: number.part(inputs),
) -> tuple[SharpnessAwareOptimizer, list[Tensor], list[Tensor]]:
    """The same in a plain loop, whose base optimizer clips what it is given; also the losses and norms."""
    norms: list[Tensor] = []
    clipping = base.register_step_pre_hook(lambda *_: norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip)))
    optimizer = SharpnessAwareOptimizer(base, method, model)
    losses: list[Tensor] = []
    model.train()
    for window in windows:
        divisor = len(window) if shrinks_by_its_window() else accumulate
        for number in optimizer.passes():
            model.zero_grad()
            total = torch.zeros(())
            parts = [cut(number, inputs) for inputs in window]
            for inputs in parts:
                loss = model(**inputs)['loss'] / divisor if loss_of is None else loss_of(model, inputs, parts)
                loss.backward(create_graph=method.backwards_create_graph)
                total += loss.detach()
            if number == (0 if method.ascent_fraction == 1 else 1):
                losses.append(total)
    clipping.remove()
    return optimizer, losses, norms


def assert_same_run(
    trainer: Any,
    method: SharpnessAware,
    model: nn.Module,
    base: torch.optim.Optimizer,
    data: Sequence[Any] | None = None,
    **options: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """Train one epoch, and in a plain loop with a copy of the model; assert equal bits, return losses and norms.

    Args:
        trainer: the Trainer, not shuffling.
        method: its method.
        model: the copy.
        base: the copy's optimizer.
        data: the micro-batches; None for those of the Trainer's samples.
        **options: those of :func:`by_passes`.
    """
    accumulate = trainer.args.gradient_accumulation_steps
    places = RandomPlaces()
    trainer.add_callback(places)
    trainer.train()
    end = torch.get_rng_state()
    trainer.remove_callback(places)
    torch.set_rng_state(places.places[0])
    data = micro_batches(trainer.train_dataset) if data is None else data
    windows = [data[first : first + accumulate] for first in range(0, len(data), accumulate)]
    optimizer, losses, norms = by_passes(method, model, windows, accumulate, base, **options)
    assert same(trainer.model.state_dict(), model.state_dict())
    assert same(state_of(trainer.optimizer), state_of(optimizer))
    assert torch.equal(torch.get_rng_state(), end)
    assert trainer.state.global_step == len(windows)
    assert trainer.sharpness_aware_optimizer.steps_perturbed == optimizer.steps_perturbed > 0
    return losses, norms


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds of it, without what the schedulers note in the groups."""
    found = copy.copy(optimizer.state_dict())
    found['param_groups'] = [
        {key: value for key, value in group.items() if key != 'initial_lr'} for group in found['param_groups']
    ]
    return found

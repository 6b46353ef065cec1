"""What the steps of a Trainer need, checked before training."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import Trainer
from transformers.utils import is_sagemaker_mp_enabled

__all__ = ['check_class', 'check_trainer', 'not_called']

_VERSIONS = 'transformers 4.51 to 5.x'
_HOOKS = ('add_callback', 'get_batch_samples', 'log', 'remove_callback', 'train', 'training_step')
# Of trl: they generate samples inside their training step, so every pass of a step would see others.
_GENERATING = frozenset(
    ('GKDTrainer', 'GRPOTrainer', 'NashMDTrainer', 'OnlineDPOTrainer', 'PPOTrainer', 'RLOOTrainer', 'XPOTrainer')
)
_STEP_IN_BACKWARD = ('lomo', 'adalomo')


def check_class(trainer: type[Any]) -> None:
    """Raise an error for a class whose steps cannot be repeated.

    Raises:
        TypeError: it is not a Trainer.
        RuntimeError: transformers' Trainer lacks a method that is overridden.
        ValueError: it generates its samples in its training step.
    """
    if not issubclass(trainer, Trainer):
        raise TypeError(f'the mixin is for Trainers, as in class {trainer.__name__}(SharpnessAwareMixin, Trainer)')
    missing = [name for name in _HOOKS if not hasattr(Trainer, name)]
    if missing:
        raise RuntimeError(
            f'the Trainer of transformers {transformers.__version__} has no {", ".join(missing)}: use {_VERSIONS}, or '
            'a newer composer_sam'
        )
    generating = sorted(_GENERATING & {base.__name__ for base in trainer.__mro__})
    if generating:
        raise ValueError(
            f'{generating[0]} generates samples in its training step, so the passes of a step would see different '
            'ones: use a Trainer of fixed batches, for example SFTTrainer, DPOTrainer or RewardTrainer'
        )


def check_trainer(trainer: Any) -> None:
    """Raise ValueError for a Trainer whose arguments let something else take the step."""
    args = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            f'{args.n_gpu} GPUs in one process (DataParallel) are not supported: start one process per GPU, with '
            'torchrun --nproc-per-node=gpu or accelerate launch, or use one GPU, with CUDA_VISIBLE_DEVICES=0'
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            'DeepSpeed takes the step itself, at its own weights: remove deepspeed from the arguments, and use '
            'DistributedDataParallel or fsdp'
        )
    if getattr(trainer, 'use_apex', False):
        raise ValueError("half_precision_backend='apex' is not supported: use 'auto', with fp16=True or bf16=True")
    if is_sagemaker_mp_enabled():
        raise ValueError("SageMaker's model parallelism takes the step itself: use DistributedDataParallel or fsdp")
    name = str(getattr(args.optim, 'value', args.optim))
    if name in _STEP_IN_BACKWARD or name.endswith('layerwise'):
        raise ValueError(
            f'optim={name!r} steps during the backward, before the other passes: use an optimizer that steps after it, '
            "for example optim='adamw_torch'"
        )


def not_called(trainer: Any, what: str) -> str:
    """Return the message for a Trainer whose ``train`` does not call what the steps need."""
    return (
        f'{type(trainer).__name__}.train() of transformers {transformers.__version__} evaluated a batch without '
        f'{what}, which the method needs: use {_VERSIONS}, and a Trainer that keeps the training loop of Trainer'
    )

"""AdamW against SAM with AdamW, on a model of transformers in Hugging Face's Trainer.

Run: python examples/hugging_face.py
Time: about 30 seconds.

The model is a tiny ResNet with new weights, so nothing is downloaded. 40 % of its training labels are wrong.
`SharpnessAwareTrainer` takes what `transformers.Trainer` takes, and a method. docs/other_trainers.md has the same for
language models, for trl's Trainers and for Accelerate.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from noisy_digits import noisy_digits
from torch.utils.data import TensorDataset
from transformers import EvalPrediction, ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from composer_sam import SAM
from composer_sam.trainers.transformers import SharpnessAwareTrainer

CONFIG = ResNetConfig(
    num_channels=1, embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type='basic', num_labels=10
)


def samples(data: TensorDataset) -> list[dict[str, Any]]:
    """Return the samples in the form that the model takes."""
    return [{'pixel_values': image, 'labels': label} for image, label in zip(*data.tensors, strict=True)]


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """Return the share of images whose label the model predicts."""
    return {'accuracy': float((np.asarray(found.predictions).argmax(axis=1) == found.label_ids).mean())}


def train(name: str, make_trainer: Callable[..., Trainer]) -> None:
    """Train one model and print its accuracy on the test images."""
    torch.manual_seed(0)  # the weights; the order of the batches is that of the arguments' seed
    train_set, test_set = map(samples, noisy_digits())
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=30,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=450,
            learning_rate=3e-3,
            warmup_ratio=0.05,
            lr_scheduler_type='cosine',
            logging_steps=220,
            save_strategy='no',
            seed=0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = make_trainer(
            model=ResNetForImageClassification(CONFIG),
            args=args,
            train_dataset=train_set,
            eval_dataset=test_set,
            compute_metrics=accuracy,
        )
        trainer.train()
        tested = trainer.evaluate()

    steps = trainer.state.global_step
    wrapped = getattr(trainer, 'sharpness_aware_optimizer', None)  # transformers' own Trainer has none
    passes = steps + (wrapped.steps_perturbed if wrapped else 0)
    print(f'{name}: test accuracy {tested["eval_accuracy"]:.1%}, {steps} steps, {passes} passes')


def main() -> None:
    train('AdamW', Trainer)
    # The first epoch is plain AdamW, as the radius is large for a model with random weights.
    train('SAM', functools.partial(SharpnessAwareTrainer, method=SAM(rho=0.3, start='1ep')))


if __name__ == '__main__':
    main()

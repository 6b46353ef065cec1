"""The network and the samples of a recipe, on which its checkpoints are measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from composer_sam.recipes import Recipe
from composer_sam.recipes.data import build_data
from composer_sam.recipes.networks import build_network
from composer_sam.recipes.schema import Text

__all__ = ['KEYS', 'Problem', 'Split', 'build_problem', 'described']

Split = Literal['train', 'test']

# The keys of a recipe that a problem depends on, and those that every recipe must have.
KEYS = (
    *('data', 'model', 'seed', 'device', 'early_stopping', 'device_train_microbatch_size'),
    *('name', 'max_duration', 'optimizer'),
)

# Numbers in a batch of inputs up to which more samples than the recipe's batch go into one forward, or into one graph.
_ONE_FORWARD, _ONE_GRAPH = 2**20, 2**16
_SAMPLE_SEED = 0  # the samples are the same for all directions


@dataclass(frozen=True)
class Problem:
    """A network and the samples its loss is measured on.

    Attributes:
        model: the recipe's network; its weights are to be replaced by those of a checkpoint.
        batches: the samples, in batches the model takes.
        samples: the number of samples.
        microbatch: the number of samples whose graph fits into memory, as in training.
    """

    model: nn.Module
    batches: list[Any]
    samples: int
    microbatch: int


def build_problem(recipe: Recipe, split: Split, samples: int) -> Problem:
    """Build the recipe's network and draw samples of its data without replacement, the same ones in every call.

    Images are not augmented. Labels are those of training, with the recipe's label noise on its training data.

    Args:
        recipe: the result of :func:`composer_sam.recipes.load_recipe`.
        split: the split of the data.
        samples: the number of samples; all of a split that has fewer.
    """
    section = recipe.data
    if hasattr(section, 'augment'):
        section = section.model_copy(update={'augment': 'none'})
    data = build_data(section, recipe.seed, keep_test=recipe.early_stopping)
    images: Any = {'train': data.train, 'test': data.test}[split].dataset
    samples = min(samples, len(images))
    # Not torch's generator: with the same seed it has chosen the wrong labels, and would choose the same images again.
    chosen = sorted(np.random.default_rng(_SAMPLE_SEED).permutation(len(images))[:samples].tolist())
    at_once = section.eval_batch_size or section.batch_size if isinstance(section, Text) else section.batch_size
    per_forward = max(at_once, _ONE_FORWARD // data.numbers)
    batches = [images.__getitems__(chosen[start : start + per_forward]) for start in range(0, samples, per_forward)]
    on_gpu = recipe.device in (None, 'gpu') and torch.cuda.is_available()
    model = build_network(recipe.model, data).to('cuda' if on_gpu else 'cpu')
    microbatch = recipe.device_train_microbatch_size
    in_training = microbatch if isinstance(microbatch, int) else section.batch_size
    return Problem(model, batches, samples, max(in_training, _ONE_GRAPH // data.numbers))


def described(data: Iterable[tuple[str, float]]) -> str:
    """Return a line for titles about data sets and the fractions of their labels that are replaced by others.

    >>> described([('digits', 0.4), ('digits', 0.4)])
    'digits, 40 % of the training labels are wrong'
    """
    lines = [
        f'{name}, {f"{100 * noise:g} % of the training labels are wrong" if noise else "no label noise"}'
        for name, noise in data
    ]
    return '; '.join(dict.fromkeys(lines))

"""What shows, in a finished run, that one of Composer's algorithms did its work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from composer.algorithms.gyro_dropout.gyro_dropout import GyroDropoutLayer
from composer.algorithms.no_op_model.no_op_model import NoOpModelClass
from composer_models import PER_EPOCH
from composer_runs import BATCHES, Run, equal
from torch import Tensor, nn


def clipped(run: Run, bound: Callable[[Tensor], Tensor | float]) -> bool:
    """The gradient that the base optimizer was given is within the bound, and reached it at some time."""
    sizes = [bound(torch.cat([g.reshape(-1) for g in given.values()])) for given in run.watch.given]
    largest = float(max(sizes))
    return len(sizes) == BATCHES and 0.049 < largest <= 0.05 * (1 + 1e-5)


def clipped_by_weights(run: Run) -> bool:
    """As ``clipped``, in proportion to the weights; their bound is on every unit, so it holds for all together."""
    for given, first in zip(run.watch.given, run.first_passes, strict=True):
        for name, gradient in given.items():
            if gradient.norm() > 0.05 * (first.weights[name].norm() + 1e-3 * len(gradient)) * (1 + 1e-5):
                return False
    return True


def averages(run: Run) -> bool:
    """Its weights are the moving average of those after each step: none of them was a perturbed one."""
    algorithm: Any = run.algorithm
    average = run.watch.after[0]
    for weights in run.watch.after[1:]:
        average = {name: (value + weights[name]) / 2 for name, value in average.items()}
    kept = (
        dict(run.model.named_parameters())
        if algorithm.ema_weights_active
        else algorithm.ema_model.named_parameters_dict
    )
    return all(torch.allclose(value, kept[name], atol=1e-6) for name, value in average.items())


def ends_at_average(run: Run) -> bool:
    """The final weights are the mean of those after each step from 0.3 of the run on."""
    last = run.watch.after[math.ceil(0.3 * BATCHES) - 1 :]
    mean = {name: torch.stack([weights[name] for weights in last]).mean(0) for name in last[0]}
    return all(torch.allclose(value, run.end[name], atol=1e-6) for name, value in mean.items())


def sees_made_up_inputs(run: Run) -> bool:
    known = {tuple(image.reshape(-1).tolist()) for image, _ in run.data}
    return any(tuple(row.reshape(-1).tolist()) not in known for p in run.first_passes for row in p.inputs[0][0])


def mixes_targets(run: Run) -> bool:
    targets = [p.targets[0][1] for p in run.first_passes]
    return sees_made_up_inputs(run) and any(((t > 0) & (t < 1)).any() for t in targets if t.ndim == 2)


def mixes_the_loss(run: Run) -> bool:
    """The loss is taken twice, of each of the two targets."""
    return sees_made_up_inputs(run) and all(len(p.targets) == 2 for p in run.first_passes)


def smooths(run: Run) -> bool:
    return all(p.targets[0][1].ndim == 2 and (p.targets[0][1] > 0).all() for p in run.first_passes)


def shapes(run: Run) -> list[tuple[int, ...]]:
    return [tuple(p.inputs[0][0].shape) for p in run.first_passes]


def grows(run: Run) -> bool:
    sizes = [shape[2:] for shape in shapes(run)]
    return sizes[0] == (4, 4) and sizes[-1] == (8, 8) and sizes == sorted(sizes)


def transformed(name: str) -> Callable[[Run], bool]:
    return lambda run: name in repr(run.data.transform)


def replaced(*kinds: type[nn.Module]) -> Callable[[Run], bool]:
    """The model has modules of these kinds, and their parameters were trained."""

    def replaced(run: Run) -> bool:
        for kind in kinds:
            names = [name for name, module in run.model.named_modules() if isinstance(module, kind)]
            inside = [p for p in run.optimized if any(p.startswith(f'{name}.') for name in names)]
            if not names or (inside and all(equal(run.start[p], run.end[p]) for p in inside)):
                return False
        return True

    return replaced


def channels_last(run: Run) -> bool:
    weight = run.model.module[3].weight
    last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return last and run.watch.given[-1]['module.3.weight'].is_contiguous(memory_format=torch.channels_last)


def drops_blocks(run: Run) -> bool:
    return len({tuple(p.reached) for p in run.first_passes}) > 1


def drops_samples(run: Run) -> bool:
    return all(not equal(p.streams[0], p.streams[1]) for p in run.first_passes)


def freezes(run: Run) -> bool:
    """From the first epoch's end on the first layer stays, out of the optimizer, while the last moves to the end."""
    stays = [equal(weights['module.0.weight'], run.end['module.0.weight']) for weights in run.watch.after]
    moves = [equal(weights['module.8.weight'], run.end['module.8.weight']) for weights in run.watch.after]
    last_step = BATCHES - 1
    return (
        stays.index(True) == PER_EPOCH - 1
        and moves.index(True) == last_step
        and not {'module.0.weight', 'module.1.weight', 'module.3.weight'} & run.optimized
        and not run.model.module[0].weight.requires_grad
    )


def standardises(run: Run) -> bool:
    return 'module.3.parametrizations.weight.original' in run.optimized


def gyro_masks(model: nn.Module) -> list[Tensor]:
    return [module.dropout_mask for module in model.modules() if isinstance(module, GyroDropoutLayer)]


def attends_linearly(run: Run) -> bool:
    embeddings = run.model.model.bert.embeddings.position_embeddings.weight
    # Twice as many sequences as the batch had, so they come as two micro-batches.
    cut = all([i['input_ids'].shape for i in p.inputs] == [(15, 8)] * 2 for p in run.first_passes)
    return cut and not embeddings.requires_grad and not embeddings.any()


def is_a_dummy(run: Run) -> bool:
    return isinstance(run.model, NoOpModelClass) and run.optimized == {'weights'}

"""From a recipe and checkpoint files to models, samples and their landscapes."""

from __future__ import annotations

import datetime
import hashlib
import math
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from composer_sam.diagnostics.measure import measure
from composer_sam.landscapes.grid import evaluate, measuring, one_thread
from composer_sam.landscapes.storage import Landscape
from composer_sam.landscapes.subspaces import (
    Around,
    Subspace,
    Through,
    grid_axis,
    hessian_directions,
    random_directions,
    weights_of,
)
from composer_sam.recipes import Recipe
from composer_sam.recipes.data import build_data
from composer_sam.recipes.models import build_model

__all__ = [
    'CheckpointError',
    'Problem',
    'Request',
    'build_problem',
    'check_files',
    'default_labels',
    'landscapes',
    'listed',
    'load_weights',
    'measure_trained',
    'measurements',
]

Split = Literal['train', 'test']

# Numbers in a batch of inputs up to which more samples than the recipe's batch go into one forward, or into one graph.
_ONE_FORWARD, _ONE_GRAPH = 2**20, 2**16
_SAMPLE_SEED = 0  # of which samples are taken: the same ones whatever the directions
_NAMED = 3  # keys that an error names


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the recipe, or a request that makes no sense for it."""


@dataclass(frozen=True)
class Problem:
    """What checkpoints of a recipe are measured on.

    Attributes:
        model: The recipe's network, with weights of no meaning.
        batches: The samples, in batches the model takes.
        samples: How many.
        microbatch: Samples whose graph fits into memory, as in training.
    """

    model: nn.Module
    batches: list[Any]
    samples: int
    microbatch: int


def build_problem(recipe: Recipe, split: Split, samples: int) -> Problem:
    """Builds the recipe's network and takes samples of its data: always the same ones, drawn without replacement.

    Images are shown without augmentation, labels as training sees them: with the recipe's noise on its training data.

    Args:
        recipe: What :func:`composer_sam.recipes.load_recipe` returned.
        split: Which data.
        samples: How many; all of the split where it has fewer.
    """
    section = recipe.data
    if hasattr(section, 'augment'):
        section = section.model_copy(update={'augment': 'none'})
    data = build_data(section, recipe.seed)
    images: Any = {'train': data.train, 'test': data.test}[split].dataset
    samples = min(samples, len(images))
    # Not torch's generator: with the same seed it has chosen which labels are wrong, and would choose those images.
    chosen = sorted(np.random.default_rng(_SAMPLE_SEED).permutation(len(images))[:samples].tolist())
    per_forward = max(section.batch_size, _ONE_FORWARD // math.prod(data.image_shape))
    batches = [images.__getitems__(chosen[start : start + per_forward]) for start in range(0, samples, per_forward)]
    on_gpu = recipe.device in (None, 'gpu') and torch.cuda.is_available()
    model = build_model(recipe.model, data.image_shape, data.num_classes).to('cuda' if on_gpu else 'cpu')
    microbatch = recipe.device_train_microbatch_size
    in_training = microbatch if isinstance(microbatch, int) else section.batch_size
    return Problem(model, batches, samples, max(in_training, _ONE_GRAPH // math.prod(data.image_shape)))


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads the weights of a checkpoint into ``model``.

    Args:
        model: The Composer model of the recipe.
        path: A checkpoint of Composer's Trainer in one file, or a saved ``state_dict()`` of the Composer model or of
            the network in it. Nothing in the file is executed.

    Raises:
        CheckpointError: If it cannot be read or is of another model.
    """
    state = _state_dict(_read(path), path)
    expected = model.state_dict()
    if not state.keys() & expected.keys():
        state = {f'module.{name}': tensor for name, tensor in state.items()}
    problems = {
        'missing': [name for name in expected if name not in state],
        'unexpected': [name for name in state if name not in expected],
        'of another shape': [
            f'{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}'
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    found = '; '.join(f'{kind}: {_some(names)}' for kind, names in problems.items() if names)
    if found:
        config = path.parent / 'config.yaml'
        hint = f'--recipe {config}' if config.is_file() else 'the recipe it was trained with, or change its model'
        raise CheckpointError(f"{path} does not fit the recipe's model; {found}. Give {hint}")
    model.load_state_dict(state)


def check_files(paths: Sequence[Path]) -> None:
    """Raises CheckpointError if there is no checkpoint, or one is not a file that can be read."""
    if not paths:
        raise CheckpointError('no checkpoint is given; name at least one .pt file')
    for path in paths:
        _check_exists(path)


def default_labels(paths: Sequence[Path]) -> list[str]:
    """Names that tell the checkpoints apart: of their files, or where those are alike of their folders."""
    names = [[path.stem, path.absolute().parent.name, f'{path.absolute().parent.name}-{path.stem}'] for path in paths]
    for alternatives in zip(*names, strict=True):
        if len(set(alternatives)) == len(paths):
            return list(alternatives)
    raise CheckpointError('the checkpoints cannot be told apart by file and folder; name them with --labels A,B')


def listed(names: Sequence[str]) -> str:
    """The names as a sentence has them: A, B and C."""
    return ' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))


@dataclass(frozen=True)
class Request:
    """Which landscape of which checkpoints.

    Attributes:
        paths: The checkpoints.
        labels: What they are called.
        directions: ``random`` and ``hessian`` give every checkpoint a landscape of its own, ``checkpoints`` gives the
            one line or plane through two or three of them.
        dims: 1 for a line, 2 for a plane.
        resolution: Points along every axis.
        reach: The largest coordinate; with ``checkpoints`` how far beyond them, as a part of their distance.
        split: Which data.
        samples: How many samples of it.
        seed: Of the random directions.
        batchnorm: With ``checkpoints``, whether running statistics are averaged or gathered anew at every point.
    """

    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    directions: Literal['random', 'hessian', 'checkpoints'] = 'random'
    dims: Literal[1, 2] = 2
    resolution: int = 25
    reach: float = 1.0
    split: Split = 'train'
    samples: int = 512
    seed: int = 0
    batchnorm: Literal['interpolate', 'recalibrate'] = 'interpolate'

    def __post_init__(self) -> None:
        if self.directions == 'checkpoints' and len(self.paths) != self.dims + 1:
            raise CheckpointError(
                f'--directions checkpoints --dims {self.dims} needs {self.dims + 1} checkpoints, got {len(self.paths)}'
            )
        if self.resolution < 2:
            raise CheckpointError(f'--resolution must be >= 2, got {self.resolution}')
        if not (math.isfinite(self.reach) and self.reach > 0):
            raise CheckpointError(f'--range must be a number > 0, got {self.reach}')


def landscapes(
    request: Request,
    recipe: Recipe,
    folder: Path,
    jobs: int | None = None,
    progress: Callable[[str, int, int], None] = lambda label, done, of: None,
) -> list[Landscape]:
    """Evaluates what is requested, on from what ``folder`` holds of it, and stores it there.

    Args:
        request: What is wanted.
        recipe: The checkpoints' recipe.
        folder: Where there is or will be a ``.npz`` file for every landscape.
        jobs: Processes; chosen by how long it takes, if not given.
        progress: Called with a landscape's label, the number of its finished rows and that of all.
    """
    problem = build_problem(recipe, request.split, request.samples)
    found = []
    for label, paths, subspace in _subspaces(request, problem):
        axes = [grid_axis(low, high, request.resolution) for low, high in subspace.box(request.reach)]

        def advance(done: int, of: int, label: str = label) -> None:
            progress(label, done, of)

        found.append(
            evaluate(
                subspace,
                problem.model,
                None,
                problem.batches,
                axes,
                label=label,
                about=_about(request, recipe, problem, paths),
                path=folder / (re.sub(r'[^\w.-]+', '_', label) + '.npz'),
                jobs=jobs,
                progress=advance,
                recalibrate=request.batchnorm == 'recalibrate',
            )
        )
    return found


def measurements(
    recipe: Recipe,
    paths: Sequence[Path],
    labels: Sequence[str],
    *,
    split: Split = 'train',
    samples: int = 512,
    progress: Callable[[str, int, int], None] = lambda label, done, of: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """What :func:`composer_sam.diagnostics.measure.measure` says about every checkpoint, and its accuracy.

    Args:
        recipe: The checkpoints' recipe.
        paths: The checkpoints.
        labels: What they are called.
        split: Which data.
        samples: How many samples of it.
        progress: Called with a word, the number of those measured and that of all.
        options: Further arguments of ``measure``.
    """
    problem = build_problem(recipe, split, samples)
    for path in paths:  # all are read before the first is measured, which can take long
        load_weights(problem.model, path)
    found = []
    for done, (path, label) in enumerate(zip(paths, labels, strict=True)):
        progress('measured', done, len(paths))
        load_weights(problem.model, path)
        with measuring(problem.model, None, problem.batches) as evaluated:
            _, accuracy = evaluated({})
        measured = measure(problem.model, None, problem.batches, microbatch=problem.microbatch, **options)
        known = {} if math.isnan(accuracy) else {'accuracy': accuracy}
        found.append({'label': label, 'checkpoint': str(path), 'split': split} | known | measured.as_dict())
    progress('measured', len(paths), len(paths))
    return found


def measure_trained(
    recipe: Recipe,
    model: nn.Module,
    *,
    split: Split = 'train',
    samples: int = 512,
    measures: Sequence[str] = ('loss', 'top_eigenvalue', 'trace', 'sam_sharpness'),
    **options: Any,
) -> dict[str, float]:
    """What :func:`composer_sam.diagnostics.measure.measure` says about a network its recipe has just trained."""
    problem = build_problem(recipe, split, samples)
    problem.model.load_state_dict(model.state_dict())
    return measure(
        problem.model, None, problem.batches, measures=measures, microbatch=problem.microbatch, **options
    ).as_dict()


def _subspaces(request: Request, problem: Problem) -> list[tuple[str, list[Path], Subspace]]:
    """Every landscape's label, its checkpoints, and the weights it is evaluated at."""
    model = problem.model
    if request.directions == 'checkpoints':
        corners = []
        for path in request.paths:
            load_weights(model, path)
            corners.append(weights_of(model))
        label = f'through {listed(request.labels)}'
        return [(label, list(request.paths), Through.of(corners, request.labels))]
    found: list[tuple[str, list[Path], Subspace]] = []
    places = ('',) if request.dims == 1 else (' 1', ' 2')
    for path, label in zip(request.paths, request.labels, strict=True):
        load_weights(model, path)
        if request.directions == 'random':
            directions = random_directions(model, request.seed, request.dims)
            axes = [f'random direction{place} (filter norms)' for place in places]
        else:
            with one_thread():  # so that a run that goes on finds the same ones
                directions, _ = hessian_directions(
                    model, None, problem.batches, request.dims, microbatch=problem.microbatch
                )
            axes = [f'Hessian eigenvector{place} (L2 distance)' for place in places]
        found.append((label, [path], Around.of(model, directions, axes, label)))
    return found


def _about(request: Request, recipe: Recipe, problem: Problem, paths: Sequence[Path]) -> dict[str, Any]:
    """What the result depends on, by names that a message can tell a user."""
    return {
        'checkpoint': [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths],
        'model': recipe.model.model_dump(),
        'data': recipe.data.model_dump(),
        'directions': request.directions,
        'dims': request.dims,
        'resolution': request.resolution,
        'range': request.reach,
        'split': request.split,
        'samples': problem.samples,
        'seed': request.seed,
        'batchnorm': request.batchnorm,
    }


def _check_exists(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(
            f'{path} is a folder, a checkpoint is one file; train with parallelism.fsdp.state_dict_type=full to have '
            'those of FSDP in one'
        )
    if not path.is_file():
        raise CheckpointError(f'checkpoint {str(path)!r} does not exist')
    if not os.access(path, os.R_OK):
        raise CheckpointError(f'checkpoint {str(path)!r} cannot be read: no permission')


def _read(path: Path) -> Any:
    """Loads a file of torch's, executing nothing: only tensors, plain values and what Composer adds are allowed."""
    array, scalar = np.empty(0), np.float64(0)
    plain: list[Any] = [np.ndarray, np.dtype, datetime.timedelta, TorchVersion]
    plain += [array.__reduce__()[0], scalar.__reduce__()[0]]
    plain += [type(np.dtype(kind)) for kind in ('f2', 'f4', 'f8', 'i4', 'i8', 'u4', 'u8', '?')]
    _check_exists(path)
    try:
        with torch.serialization.safe_globals(plain):
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r'GLOBAL ([\w.]+)', str(error))
        if asked is None:
            raise CheckpointError(f'{path} is no checkpoint: not a file that torch.save has written') from None
        raise CheckpointError(
            f'{path} holds {asked[1]}, which would have to be executed to be loaded; save its weights alone: '
            "torch.save(model.state_dict(), 'weights.pt')"
        ) from None
    except Exception as error:
        raise CheckpointError(f'{path} is no checkpoint: {type(error).__name__}: {error}') from None


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The weights in what a checkpoint file holds."""
    state = loaded
    if isinstance(loaded, Mapping) and isinstance(loaded.get('state'), Mapping):
        state = loaded['state'].get('model')
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path} holds no weights: it is neither a checkpoint of Composer's Trainer nor a saved state_dict()"
        )
    return dict(state)


def _some(names: Sequence[str]) -> str:
    more = f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''
    return ', '.join(names[:_NAMED]) + more

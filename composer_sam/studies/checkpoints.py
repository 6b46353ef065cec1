"""Checkpoint files: checked, named, and loaded without executing anything in them."""

from __future__ import annotations

import datetime
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

__all__ = ['CheckpointError', 'check_files', 'default_labels', 'load_weights']

_NAMED = 3  # keys that an error names


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit the recipe, or a request it cannot be used for."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of a checkpoint into ``model``.

    Args:
        model: the Composer model of the recipe.
        path: a checkpoint of Composer's Trainer in one file, or a saved ``state_dict()`` of the Composer model or of
            the network in it. Nothing in the file is executed.

    Raises:
        CheckpointError: the file cannot be read, or is a checkpoint of another model.
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
    """Check that there is at least one checkpoint and that all are files that can be read.

    Raises:
        CheckpointError: there is none, or one of them cannot be read.
    """
    if not paths:
        raise CheckpointError('no checkpoint is given; name at least one .pt file')
    for path in paths:
        _check_exists(path)


def default_labels(paths: Sequence[Path]) -> list[str]:
    """Return different names for the checkpoints: those of their files, of their folders, or of both.

    Raises:
        CheckpointError: no such names exist.
    """
    names = [[path.stem, path.absolute().parent.name, f'{path.absolute().parent.name}-{path.stem}'] for path in paths]
    for alternatives in zip(*names, strict=True):
        if len(set(alternatives)) == len(paths):
            return list(alternatives)
    raise CheckpointError('the checkpoints cannot be told apart by file and folder; name them with --labels A,B')


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
    """Load a file written by torch without executing anything: tensors, plain values and Composer's types only."""
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
    """Return the weights in the content of a checkpoint file."""
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

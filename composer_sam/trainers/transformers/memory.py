"""What a method remembers, where FSDP has loaded it on the first rank only."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from composer_sam.engine.step import MEMORY_PREFIX

__all__ = ['share_memory']


def share_memory(optimizer: Optimizer) -> None:
    """Give all ranks what the first one remembers.

    Of a whole checkpoint (``FULL_STATE_DICT``) torch gives the other ranks only what a fresh optimizer has places for,
    and it has none for what a method remembers. Every rank must call this, because it is a collective.

    Args:
        optimizer: the base optimizer, after its checkpoint was loaded.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    found = [[_described(optimizer.state.get(parameter, {})) for parameter in parameters]]
    dist.broadcast_object_list(found)
    for parameter, entries in zip(parameters, found[0], strict=True):
        if not entries:
            continue
        own = optimizer.state[parameter]
        for key, (value, shape, kind) in entries.items():
            # The engine shards a whole tensor by the first rank's, so the contents on the other ranks do not matter.
            own.setdefault(key, value if shape is None else torch.zeros(shape, dtype=kind, device=parameter.device))


def _described(state: dict[Any, Any]) -> dict[str, tuple[float | None, torch.Size | None, torch.dtype | None]]:
    """Return the method's entries in a parameter's state: numbers, and the shapes and types of tensors."""
    return {
        key: (None, value.shape, value.dtype) if isinstance(value, Tensor) else (value, None, None)
        for key, value in state.items()
        if str(key).startswith(MEMORY_PREFIX)
    }

"""The planner with which torch loads a checkpoint of shards together with what a method remembers."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# A checkpoint's state has no types.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from composer_sam.engine.step import MEMORY_PREFIX

__all__ = ['LoadPlanner']


class LoadPlanner(DefaultLoadPlanner):
    """A planner for ``torch.distributed.checkpoint.load`` that also loads what methods remember.

    torch loads of a checkpoint what the state that it is given has places for, and a fresh base optimizer has none for
    what a method remembers. The planner adds a place for each such entry of the checkpoint. A checkpoint without
    any loads as with torch's own planner.

    Raises:
        ValueError: the checkpoint remembers something of a parameter that the model does not have.
    """

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        paths: dict[str, Any] = {} if metadata is None else metadata.planner_data or {}
        for key, path in paths.items():
            if metadata is not None and str(path[-1]).startswith(MEMORY_PREFIX):
                _add(state_dict, path, metadata.state_dict_metadata[key])
        super().set_up_planner(state_dict, metadata, is_coordinator)


def _add(state_dict: dict[str, Any], path: tuple[Any, ...], stored: object) -> None:
    """Add a place for one entry; the path ends in the parameter's name and the entry's."""
    *outer, name, entry = path
    place = state_dict
    for step in outer:
        if step not in place:
            return  # the optimizer's state is not asked for
        place = place[step]
    value: Any = 0.0
    if isinstance(stored, TensorStorageMetadata):
        parameter = _parameter(state_dict, name)
        if parameter is None or parameter.shape != stored.size:
            raise ValueError(
                f'the checkpoint has {entry} of shape {tuple(stored.size)} for {name}, which the model does not have '
                'in this shape: load it into the model that it was saved from'
            )
        value = torch.zeros_like(parameter, dtype=stored.properties.dtype)
    place.setdefault(name, {})[entry] = value


def _parameter(state_dict: dict[str, Any], name: str) -> Tensor | None:
    """Return the parameter of this name in the model's part of the state, wherever that is."""
    found = state_dict.get(name)
    if isinstance(found, Tensor):
        return found.detach()
    inner = (_parameter(value, name) for value in state_dict.values() if isinstance(value, dict))
    return next((parameter for parameter in inner if parameter is not None), None)

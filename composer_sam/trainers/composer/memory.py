"""What lets a Trainer with FSDP load what a method remembers: a place for each entry, before the checkpoint is read."""

from __future__ import annotations

from typing import Any

from composer.core import State
from composer.utils import FSDP2Config
from torch.optim import Optimizer

from composer_sam.engine.load_planner import LoadPlanner
from composer_sam.engine.optimizer import SharpnessAwareOptimizer
from composer_sam.engine.rule import Method
from composer_sam.engine.step import MEMORY_PREFIX

__all__ = ['expect_memory']


class _FSDP2Config(FSDP2Config):
    """Composer's configuration, which has no settable planner, with ours."""

    @property
    def load_planner(self) -> LoadPlanner:
        return LoadPlanner()


def expect_memory(method: Method, state: State) -> None:
    """Let the trainer load the method's memory from checkpoints of FSDP; a planner of the user's own is kept."""
    config: Any = state.fsdp_config
    if config is None or not method.remembers:
        return
    if config.state_dict_type == 'full':
        _expect_numbers(method, state)
    elif isinstance(config, FSDP2Config):
        planned = object.__new__(_FSDP2Config)  # its __init__ would warn a second time that FSDP2 is experimental
        vars(planned).update(vars(config))
        state.fsdp_config = planned
    elif config.load_planner is None:
        config.load_planner = LoadPlanner()


def _expect_numbers(method: Method, state: State) -> None:
    """Let torch find places for the numbers of a whole checkpoint, until the optimizer is wrapped."""

    def add(optimizer: Optimizer, found: dict[str, Any]) -> None:
        if isinstance(state.optimizers[0], SharpnessAwareOptimizer):
            return
        for group in found['param_groups']:
            for place in group['params']:
                numbers = {MEMORY_PREFIX + name: 0.0 for name in method.held_numbers}
                found['state'][place] = numbers | found['state'].get(place, {})

    if method.held_numbers:
        state.optimizers[0].register_state_dict_post_hook(add)

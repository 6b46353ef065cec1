"""The processes all distributed tests of a session share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import Job, Ranks


@pytest.fixture(scope='session')
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Ranks]:
    """The outcome of all selected tests for so many ranks, run when the first of them asks."""

    @functools.cache
    def run(world_size: int) -> Ranks:
        jobs = [
            Job(
                name=item.nodeid,
                folder=str(Path(item.path).parent),
                module=Path(item.path).stem,
                function=item.originalname,
                arguments=dict(item.callspec.params) if hasattr(item, 'callspec') else {},
            )
            for item in request.session.items
            if isinstance(item, pytest.Function) and getattr(item.function, 'world_size', None) == world_size
        ]
        filters = request.config.getini('filterwarnings')
        return Ranks(world_size, jobs, tmp_path_factory.mktemp(f'ranks-{world_size}'), filters)

    return run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave FSDP2 out under torch 2.6, where it cannot train on CPUs (its streams have no record_event)."""
    if torch.__version__ >= '2.7':
        return
    left_out = [item for item in items if 'fsdp2' in item.nodeid or 'frozen_parameters_beside_shards' in item.nodeid]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]

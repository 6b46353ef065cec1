"""The processes all distributed tests of a session share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
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
        return Ranks(world_size, jobs, tmp_path_factory.mktemp(f'ranks-{world_size}'))

    return run

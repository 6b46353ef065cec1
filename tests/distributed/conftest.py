"""The two processes all distributed tests of a session share."""

from __future__ import annotations

from pathlib import Path

import pytest
from pair import Job, Pair


@pytest.fixture(scope='session')
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The outcome of all selected two-rank tests, run when the first of them asks."""
    jobs = [
        Job(
            name=item.nodeid,
            folder=str(Path(item.path).parent),
            module=Path(item.path).stem,
            function=item.originalname,
            arguments=dict(item.callspec.params) if hasattr(item, 'callspec') else {},
        )
        for item in request.session.items
        if isinstance(item, pytest.Function) and getattr(item.function, 'runs_on_two_ranks', False)
    ]
    return Pair(jobs, tmp_path_factory.mktemp('two_ranks'))

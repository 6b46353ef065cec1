"""Tests that run on several processes: collected by pytest as usual, executed by gloo ranks.

A function marked ``@two_ranks`` or ``@four_ranks`` is a test whose body runs on all ranks, with the process group made.
All such tests a session selects share the same processes, because importing Composer costs seconds; when a test fails
its processes end and new ones run the tests that are left.

Run as a script this module is one rank.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import inspect
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

__all__ = ['Job', 'Ranks', 'four_ranks', 'gathered', 'shared_folder', 'two_ranks']

SECONDS_PER_TEST = 180
SECONDS_TO_END = 5
IS_RANK = 'COMPOSER_SAM_TEST_RANK'


@dataclass(frozen=True)
class Job:
    """One test to run on all ranks."""

    name: str
    folder: str
    module: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


def _on(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test's body on that many ranks. It may be parametrised, and takes no fixtures."""

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        if IS_RANK in os.environ:
            return test

        @functools.wraps(test)
        def report(request: pytest.FixtureRequest, ranks: Callable[[int], Ranks], **arguments: Any) -> None:
            del arguments
            ranks(world_size).report(request.node.nodeid)

        own = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ('request', 'ranks')]
        signature = inspect.Signature([*own, *inspect.signature(test).parameters.values()])
        vars(report).update(__signature__=signature, world_size=world_size)
        del vars(report)['__wrapped__']
        return report

    return decorated


two_ranks = _on(2)
four_ranks = _on(4)


class Ranks:
    """The outcome of a list of jobs on several ranks.

    Args:
        world_size: the number of ranks.
        jobs: the tests.
        folder: where the ranks write.
        filters: what to do about warnings, in the lines of pytest's ``filterwarnings``.
    """

    def __init__(self, world_size: int, jobs: list[Job], folder: Path, filters: list[str]):
        self._world_size = world_size
        self._filters = filters
        self._outcomes: list[dict[str, str | None]] = [{} for _ in range(world_size)]
        self._outputs: dict[str, list[str]] = {}
        for attempt in range(len(jobs)):
            self._folder = folder / str(attempt)
            self._folder.mkdir()
            self._run(jobs)
            jobs = [job for job in jobs if not any(job.name in outcomes for outcomes in self._outcomes)]
            if not jobs:
                break

    def report(self, name: str) -> None:
        """Fail as the ranks failed."""
        failures = []
        for rank, outcomes in enumerate(self._outcomes):
            outcome = outcomes.get(name)
            if outcome is None:
                failures.append(f'rank {rank} did not finish the test:\n{self._outputs[name][rank]}')
            elif outcome:
                failures.append(f'rank {rank}:\n{outcome}')
        if failures:
            pytest.fail('\n'.join(failures), pytrace=False)

    def _run(self, jobs: list[Job]) -> None:
        """Run jobs until they are done or one fails: the ranks end with a failure, and the next ones go on."""
        (self._folder / 'jobs').write_bytes(pickle.dumps((jobs, self._filters)))
        port = _free_port()
        processes = [self._start(rank, port) for rank in range(self._world_size)]
        while all(process.poll() is None for process in processes):
            time.sleep(0.05)
        for process in processes:
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        outputs = [(self._folder / f'output-{rank}').read_text(errors='replace') for rank in range(self._world_size)]
        for rank, outcomes in enumerate(self._outcomes):
            outcomes.update(self._read(rank))
        if not any(outcomes.keys() & {job.name for job in jobs} for outcomes in self._outcomes):
            raise RuntimeError('the ranks did not start:\n' + '\n'.join(outputs))
        self._outputs.update((job.name, [output[-6000:] for output in outputs]) for job in jobs)

    def _start(self, rank: int, port: int) -> subprocess.Popen:
        environment = {
            **os.environ,
            IS_RANK: '1',
            'RANK': str(rank),
            'LOCAL_RANK': str(rank),
            'WORLD_SIZE': str(self._world_size),
            'LOCAL_WORLD_SIZE': str(self._world_size),
            'NODE_RANK': '0',
            'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': str(port),
            'PYTHONPATH': os.pathsep.join(entry for entry in sys.path if entry),
            'PYTHONUNBUFFERED': '1',
            'OMP_NUM_THREADS': '1',
            'FSDP_VERSION': '2',
        }
        with (self._folder / f'output-{rank}').open('wb') as output:
            command = [sys.executable, __file__, str(self._folder)]
            return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def _read(self, rank: int) -> dict[str, str | None]:
        outcomes: dict[str, str | None] = {}
        path = self._folder / f'outcomes-{rank}'
        if path.exists():
            with path.open('rb') as file, contextlib.suppress(EOFError):
                while True:
                    outcomes.update(pickle.load(file))
        return outcomes


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """An empty folder that all ranks know, while they are in this context."""
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else '']
    dist.broadcast_object_list(folders)
    try:
        yield Path(folders[0])
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folders[0], ignore_errors=True)


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's ``tensor``, which must have the same shape on all ranks."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def _filter_warnings(line: str) -> None:
    """Do as a line of pytest's ``filterwarnings`` says: ``action:message:category:module``."""
    action, message, category, module = [part.strip() for part in (line + ':::').split(':')][:4]
    package, _, name = category.rpartition('.')
    found = getattr(importlib.import_module(package or 'builtins'), name or 'Warning')
    warnings.filterwarnings(cast(Any, action), message, found, rf'{re.escape(module)}\Z' if module else '')


def _main(folder: Path) -> None:
    rank = int(os.environ['RANK'])
    torch.set_num_threads(1)
    dist.init_process_group('gloo', timeout=timedelta(seconds=SECONDS_PER_TEST / 2))
    jobs: list[Job]
    filters: list[str]
    jobs, filters = pickle.loads((folder / 'jobs').read_bytes())
    for line in filters:
        _filter_warnings(line)
    with (folder / f'outcomes-{rank}').open('wb') as file:

        def note(name: str, outcome: str | None) -> None:
            file.write(pickle.dumps({name: outcome}))
            file.flush()

        for job in jobs:
            # a rank that hangs outside a collective shows where
            faulthandler.dump_traceback_later(SECONDS_PER_TEST, exit=True)
            note(job.name, None)
            try:
                if job.folder not in sys.path:
                    sys.path.insert(0, job.folder)
                getattr(importlib.import_module(job.module), job.function)(**job.arguments)
                dist.barrier()
            except BaseException:
                note(job.name, traceback.format_exc())
                os._exit(1)
            note(job.name, '')
    # not destroy_process_group(): it may wait for ever for gloo's threads
    os._exit(0)


if __name__ == '__main__':
    _main(Path(sys.argv[1]))

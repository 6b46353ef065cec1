"""A function run on gloo processes of this machine, which are ended in any case."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

__all__ = ['on_ranks']


def on_ranks(
    ranks: int, function: Callable[..., Any], *arguments: Any, patience: float, seconds: float = float('inf')
) -> Any:
    """Run ``function(*arguments)`` on new gloo processes of one thread each, and return the result of rank 0.

    Args:
        ranks: the number of processes.
        function: called on every rank; returns JSON's own types.
        arguments: the arguments of the function.
        patience: seconds a collective may take.
        seconds: seconds all of it may take.

    Raises:
        RuntimeError: the ranks did not finish in time. An exception of a rank is raised with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        started: Any = torch.multiprocessing.start_processes(
            _rank, (ranks, folder, patience, function, arguments), ranks, join=False, daemon=True, start_method='spawn'
        )
        deadline = time.monotonic() + seconds
        try:
            while not started.join(timeout=1):
                if time.monotonic() > deadline:
                    raise RuntimeError(f'{ranks} ranks were not done in {seconds} s')
        finally:
            for process in started.processes:
                process.kill()
        return json.loads((Path(folder) / 'found').read_text())


def _rank(
    rank: int, ranks: int, folder: str, patience: float, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # Composer asks the environment, not torch, for these.
    places = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': ranks, 'LOCAL_WORLD_SIZE': ranks, 'NODE_RANK': 0}
    os.environ.update({name: str(value) for name, value in places.items()})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Composer's handler may never return
    torch.set_num_threads(1)
    limit = timedelta(seconds=patience)
    dist.init_process_group('gloo', f'file://{folder}/rendezvous', limit, world_size=ranks, rank=rank)
    found = function(*arguments)
    if rank == 0:
        (Path(folder) / 'found').write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # destroy_process_group() may never return, as it waits for gloo's threads

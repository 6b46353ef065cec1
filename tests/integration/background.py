"""A command that runs beside the test, in a process group of its own, until what the test waits for is there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def started(arguments: list[str], out: Path, file: str) -> subprocess.Popen[bytes]:
    """Start ``composer-sam`` and return its process once a file of that pattern is in its folder."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get('PYTHONPATH')]))
    process = subprocess.Popen(
        [sys.executable, '-m', 'composer_sam', *arguments],
        env={**os.environ, 'PYTHONPATH': path},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob(file)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process

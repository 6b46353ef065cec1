"""A program in a terminal of a given width, and what is to be seen there when it has ended."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ['Seen', 'in_terminal']

REPOSITORY = Path(__file__).parents[2]
_NOT_PASSED_ON = ('COLUMNS', 'LINES', 'NO_COLOR', 'FORCE_COLOR')


@dataclass(frozen=True)
class Seen:
    """What a program has left in its terminal.

    Attributes:
        code: the exit code.
        lines: the lines that are to be seen at the end; what a line was overwritten with counts, colours do not.
        written: everything it has written.
    """

    code: int
    lines: list[str]
    written: str


def in_terminal(columns: int, *arguments: str, interrupt_at: str | None = None) -> Seen:
    """Run ``composer-sam`` in a pseudo terminal; press Ctrl-C as soon as it has written ``interrupt_at``."""
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            # Not execv: readline, which pytest imports, sets COLUMNS behind the back of os.environ.
            kept = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
            environment = {**kept, 'TERM': 'xterm', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': _path()}
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack('HHHH', 40, columns, 0, 0))
            os.execve(sys.executable, [sys.executable, '-m', 'composer_sam', *arguments], environment)
        finally:
            os._exit(127)
    written = _read(pid, terminal, interrupt_at)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    text = written.decode(errors='replace')
    lines = [_shown(line) for line in text.replace('\r\n', '\n').split('\n')]
    return Seen(os.waitstatus_to_exitcode(status), [line for line in lines if line], text)


def _read(pid: int, terminal: int, interrupt_at: str | None) -> bytes:
    written, deadline = b'', time.monotonic() + 240
    while time.monotonic() < deadline:
        ready, _, _ = select.select([terminal], [], [], 1)
        if not ready:
            continue
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # Linux says so where the program has ended
            return written
        if not part:
            return written
        written += part
        if interrupt_at is not None and interrupt_at.encode() in written:
            interrupt_at = None
            os.write(terminal, b'\x03')
    os.kill(pid, 9)
    return written


def _shown(line: str) -> str:
    """What is to be seen of a line: after the last time the cursor went to its start or it was erased."""
    last = re.split(r'\r|\x1b\[2K', line)
    text = next((part for part in reversed(last) if re.sub(r'\x1b\[[?0-9;]*[A-Za-z]', '', part)), '')
    return re.sub(r'\x1b\[[?0-9;]*[A-Za-z]', '', text).rstrip()


def _path() -> str:
    return os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get('PYTHONPATH')]))

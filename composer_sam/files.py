"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

__all__ = ['make_writable', 'write_whole']


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new one and never a part of it.

    Args:
        path: the file; its folder must exist.
        content: text is encoded as UTF-8.

    Raises:
        OSError: the content could not be written, for example on a full disk; the old file is untouched.
    """
    # Its own name, so that two processes that write the same file do not write into one another's.
    partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def make_writable(folder: Path) -> None:
    """Create a folder, with its parents, and make sure that files can be written into it.

    Raises:
        OSError: it cannot be created, or nothing can be written into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass

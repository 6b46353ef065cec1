"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

__all__ = ['write_whole']


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new one and never a part of it.

    Args:
        path: the file; its folder must exist.
        content: text is encoded as UTF-8.

    Raises:
        OSError: the content could not be written, for example on a full disk; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    # Its own name, so that two processes that write the same file do not write into one another's.
    handle, partial = tempfile.mkstemp(prefix=f'.{path.name}.', suffix='.partial', dir=path.parent)
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(data)
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _umask() -> int:
    """The process's mask of permissions, which can be read only by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask

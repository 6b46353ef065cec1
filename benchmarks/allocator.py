"""Processes whose C library keeps freed memory, and processes whose C library has its default settings.

glibc returns free memory at the end of its heap to the kernel; when it is needed again, the kernel supplies it page by
page, which takes time. Whether this happens in a step depends on what else is in the heap: a base step can lose a third
of its time to it, or nothing. Steps are therefore compared in processes that keep their memory, and once with the
default settings.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

__all__ = ['ALLOCATORS', 'apart']

_KEEP = {'MALLOC_TRIM_THRESHOLD_': '4000000000', 'MALLOC_MMAP_THRESHOLD_': '4000000000'}
ALLOCATORS = {'default': {}, 'keeps': _KEEP}


def apart(allocator: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of the function from a new process, started with the settings of an allocator."""
    found = dict(os.environ)
    for key in _KEEP:
        os.environ.pop(key, None)
    os.environ.update(ALLOCATORS[allocator])
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(found)

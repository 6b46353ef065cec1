"""Processes whose C library keeps freed memory, or hands it back to the system as it does by itself.

glibc returns memory that lies free at the end of its heap, and whoever asks for it again waits for the kernel to supply
it page by page. Whether that happens in a step depends on what else lies in the heap: a base step can lose a third of
its time to it, or none. What is compared is therefore measured in processes that keep their memory, and once as it is.
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
    """The function's result in a fresh process, whose C library was told at its start what to do with freed memory."""
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

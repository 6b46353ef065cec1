"""The global random streams: read, and put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ['RandomStreams']


class RandomStreams:
    """The streams of Python, NumPy, torch's CPU and the accelerators among the devices given.

    Generators a module makes for itself (``torch.Generator()``) are not known here.
    """

    def __init__(self, devices: set[torch.device]):
        self.cuda = [device for device in devices if device.type == 'cuda']
        self._mps = any(device.type == 'mps' for device in devices)

    def read(self) -> tuple[Any, ...]:
        """Where the streams are."""
        return (
            random.getstate(),
            np.random.get_state(),  # noqa: NPY002 (the global stream is what libraries draw from)
            torch.get_rng_state(),
            [torch.cuda.get_rng_state(device) for device in self.cuda],
            torch.mps.get_rng_state() if self._mps else None,
        )

    def write(self, places: tuple[Any, ...]) -> None:
        """Put the streams back to where they were when ``places`` was read."""
        python, numpy, cpu, cuda, mps = places
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for device, state in zip(self.cuda, cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        if mps is not None:
            torch.mps.set_rng_state(mps)

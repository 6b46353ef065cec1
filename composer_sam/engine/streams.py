"""The global random streams, which can be read and put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ['RandomStreams']


class RandomStreams:
    """The random streams of Python, NumPy, torch's CPU and the accelerators among the devices given.

    Generators that a module makes for itself (``torch.Generator()``) are not included.
    """

    def __init__(self, devices: set[torch.device]):
        self.cuda = [device for device in devices if device.type == 'cuda']
        self._mps = any(device.type == 'mps' for device in devices)

    def read(self) -> tuple[Any, ...]:
        """Return the states of the streams."""
        return (
            random.getstate(),
            np.random.get_state(legacy=False),  # noqa: NPY002 (the global stream is what libraries draw from)
            torch.get_rng_state(),
            [torch.cuda.get_rng_state(device) for device in self.cuda],
            torch.mps.get_rng_state() if self._mps else None,
        )

    def write(self, places: tuple[Any, ...]) -> None:
        """Put the streams back to the states ``places``, which :meth:`read` returned."""
        python, numpy, cpu, cuda, mps = places
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for device, state in zip(self.cuda, cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        if mps is not None:
            torch.mps.set_rng_state(mps)

"""The global random streams, which can be read and put back."""

from __future__ import annotations

import ctypes
import functools
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

__all__ = ['RandomStreams', 'computing_on', 'streams_of']


@dataclass(frozen=True)
class _Stream:
    """One stream.

    Attributes:
        name: as a message shows it.
        read: returns the stream's state.
        write: puts the stream back to a state.
        same: whether two states that were read one after the other are the same.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    same: Callable[[Any, Any], bool]


def _same_python(a: Any, b: Any) -> bool:
    # A draw moves the position, the last number of the state. When the position comes round again, after 624 draws, all
    # words before it are others.
    return a[1][-4:] == b[1][-4:] and a[2] == b[2]


class _NumPy:
    """The global stream of NumPy, which libraries draw from.

    NumPy takes longer to return its state than to draw from it. So the state is read again only if the generator's
    memory has changed, or if it keeps a normal number for the next draw, which does not show there.
    """

    _BYTES = 4 * 625  # of the Mersenne Twister: its words, and the position

    def __init__(self) -> None:
        self._memory = b''
        self._state: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        generator: Any = np.random.get_bit_generator()  # pyright: ignore
        known = isinstance(generator, np.random.MT19937)
        memory = ctypes.string_at(generator.ctypes.state_address, self._BYTES) if known else b''
        if not known or memory != self._memory or self._state['has_gauss']:
            self._state = np.random.get_state(legacy=False)  # noqa: NPY002
            self._memory = memory  # last: an interrupt before it makes the next read a whole one
        return self._state

    def write(self, state: Any) -> None:
        self._memory = b''
        np.random.set_state(state)  # noqa: NPY002


def _same_torch(a: Any, b: Any) -> bool:
    return a.numpy().tobytes() == b.numpy().tobytes()  # a third of the time of torch.equal


def _same_numpy(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, dict):  # of a kind that depends on the generator
        ours = cast(dict[str, Any], a)
        return ours.keys() == b.keys() and all(_same_numpy(value, b[key]) for key, value in ours.items())
    return np.array_equal(cast(Any, a), b) if isinstance(a, np.ndarray) else a == b


_numpy = _NumPy()
_ALWAYS = (
    _Stream("Python's random", random.getstate, random.setstate, _same_python),
    _Stream('numpy.random', _numpy.read, _numpy.write, _same_numpy),
    _Stream('torch', torch.get_rng_state, torch.set_rng_state, _same_torch),
)


class RandomStreams:
    """The random streams of Python, NumPy, torch's CPU and the accelerators among the devices given.

    Generators that a module makes for itself (``torch.Generator()``) are not included.

    Attributes:
        names (list[str]): the streams, in the order of their states.
    """

    def __init__(self, devices: Iterable[torch.device]):
        chosen = set(devices)
        self.cuda = [device for device in chosen if device.type == 'cuda']
        self._streams = [*_ALWAYS, *map(_cuda, self.cuda)]
        if any(device.type == 'mps' for device in chosen):
            self._streams.append(_Stream('torch on mps', torch.mps.get_rng_state, torch.mps.set_rng_state, _same_torch))
        self.names = [stream.name for stream in self._streams]

    def read(self) -> list[Any]:
        """Return the states of the streams."""
        return [stream.read() for stream in self._streams]

    def write(self, places: Sequence[Any], only: Collection[int] | None = None) -> None:
        """Put streams back to ``places``, which :meth:`read` returned; ``only`` those of the given numbers."""
        for number, (stream, place) in enumerate(zip(self._streams, places, strict=True)):
            if only is None or number in only:
                stream.write(place)

    def moved(self, since: Sequence[Any], only: Collection[int] | None = None) -> list[int]:
        """Return the numbers of the streams that are not where they were; ``only`` those of the given numbers."""
        return [
            number
            for number, (stream, place) in enumerate(zip(self._streams, since, strict=True))
            if (only is None or number in only) and not stream.same(stream.read(), place)
        ]


def computing_on(devices: frozenset[torch.device]) -> frozenset[torch.device]:
    """Return the devices that passes can draw on: those of the tensors, and the GPU where these are offloaded."""
    if not torch.cuda.is_initialized():
        return devices
    return devices | {torch.device('cuda', torch.cuda.current_device())}


def streams_of(devices: frozenset[torch.device]) -> RandomStreams:
    """Return the streams that passes over tensors on these devices can draw from."""
    return _streams_of(computing_on(devices))


@functools.lru_cache(maxsize=16)
def _streams_of(devices: frozenset[torch.device]) -> RandomStreams:
    return RandomStreams(devices)  # making them anew in every step would take time


def _cuda(device: torch.device) -> _Stream:
    return _Stream(
        f'torch on {device}',
        lambda: torch.cuda.get_rng_state(device),
        lambda state: torch.cuda.set_rng_state(state, device),
        _same_torch,
    )

"""Controls of state that a repeated pass must not change: random streams, buffers, attributes and a host's records.

A control is made before the first pass and saves the state. The step calls ``first_pass_done()`` after the first pass
over the whole batch, ``leave_out()`` before a pass over a part of it that comes earlier, ``rewind()`` before each pass
but the first, ``settle()`` after the last pass and ``rollback()`` if the step failed. It calls ``discard()`` instead of
``settle()`` if the batch must leave nothing behind but the random numbers it drew. So every pass sees the same random
numbers and the same buffers. After the step, the state is as one ordinary pass would have left it; after a failure, it
is as if the step had never begun.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from composer_sam.engine.collecting import collecting
from composer_sam.engine.streams import streams_of
from composer_sam.engine.wrappers import broadcast_buffers, replicas
from composer_sam.vectors import multi_tensor

__all__ = [
    'BufferControl',
    'Control',
    'RandomControl',
    'Snapshots',
    'end_skipped',
    'flattens',
]

log = logging.getLogger(__name__)

Snapshot = TypeVar('Snapshot')

_told: set[str] = set()  # the streams that a warning has named


class Control(Protocol):
    """The protocol of a control, which guards one kind of state during the passes of a step."""

    def leave_out(self) -> None: ...

    def first_pass_done(self) -> None: ...

    def rewind(self) -> None: ...

    def settle(self) -> None: ...

    def discard(self) -> None: ...

    def rollback(self) -> None: ...


def end_skipped(controls: Iterable[Control], discard: bool) -> None:
    """End a skipped step: keep the state of the first pass, or with ``discard`` only the random numbers it drew."""
    for control in controls:
        control.discard() if discard else control.settle()


class RandomControl:
    """The control of the global random streams; see :class:`~composer_sam.engine.streams.RandomStreams`.

    Only streams that the first pass draws from are put back, so that a thread may draw from the others meanwhile. If
    the passes of a step draw different amounts from a stream, as they do if a thread draws from it too, that is said
    once. Generators that a module makes for itself are not put back.
    """

    def __init__(self, devices: frozenset[torch.device]):
        self._streams = streams_of(devices)
        self._before = self._after = self._streams.read()
        self._drawn: list[int] | None = None  # not known before the first pass is done
        self._repeated = False

    def leave_out(self) -> None:
        """Do nothing: until the first pass is done, all streams are put back."""

    def first_pass_done(self) -> None:
        self._drawn = self._streams.moved(self._before)
        if self._drawn:
            self._after = self._streams.read()

    def rewind(self) -> None:
        if self._drawn is None:
            self._streams.write(self._before)
        elif self._drawn:
            self._check_alone(self._drawn)
            self._streams.write(self._before, self._drawn)
            self._repeated = True

    def settle(self) -> None:
        if self._drawn:
            if self._repeated:
                self._check_alone(self._drawn)
            self._streams.write(self._after, self._drawn)

    def discard(self) -> None:
        self.settle()

    def rollback(self) -> None:
        if not collecting():
            self._streams.write(self._before)

    def _check_alone(self, drawn: list[int]) -> None:
        """Say it if a stream is not where each pass leaves it that draws the same numbers as the first."""
        for number in self._streams.moved(self._after, drawn):
            name = self._streams.names[number]
            if name not in _told:
                _told.add(name)
                log.warning(
                    'The passes of a step draw different amounts of random numbers from the global stream of %s. If '
                    'another thread draws from it (one that loads data), it gets numbers twice: give it a generator of '
                    'its own, or load data in processes. Reported once.',
                    name,
                )


_Buffers: TypeAlias = dict[str, Tensor | None]


@dataclass(frozen=True)
class _Contents:
    """What all buffers are and contain at one moment.

    Attributes:
        registered: the modules' buffers, where there are any, and the tensors registered there, by name.
        flat: for every device and data type its tensors, their shapes, and one copy of all contents.
        single: tensors that cannot be flattened, each with its module's buffers, its name and a copy.
    """

    registered: list[tuple[_Buffers, _Buffers]]
    flat: list[tuple[list[Tensor], list[torch.Size], Tensor]]
    single: list[tuple[_Buffers, str, Tensor]]


class Snapshots(ABC, Generic[Snapshot]):
    """A control that reads the whole of its state, and puts back what it has read.

    Every pass begins with the state that the first one began with; after the step it is that of the pass that counts.
    ``__init__`` reads the state, so a subclass sets what its ``_read`` needs before it calls it.
    """

    def __init__(self) -> None:
        self._before = self._read()
        self._after: Snapshot | None = None

    def leave_out(self) -> None:
        """Do nothing: all of the state is put back before every pass."""

    def first_pass_done(self) -> None:
        self._after = self._read()

    def rewind(self) -> None:
        self._write(self._before)

    def settle(self) -> None:
        if self._after is not None:
            self._write(self._after)

    @abstractmethod
    def discard(self) -> None: ...

    def rollback(self) -> None:
        self._write(self._before)

    @abstractmethod
    def _read(self) -> Snapshot: ...

    @abstractmethod
    def _write(self, saved: Snapshot) -> None: ...


class BufferControl(Snapshots[_Contents]):
    """The control of all buffers of a module: BatchNorm statistics, counters, spectral norms and any other.

    It puts back both which tensor is registered and what the tensor contains, because modules change buffers in both
    ways, and register new ones. DistributedDataParallel broadcasts rank 0's buffers at the first forward after a
    synchronised backward. This class does it before the first pass, so that all passes begin with the same buffers.

    Args:
        model: the model, in its wrapper.
        modules: all its modules.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]):
        self._modules = [module._buffers for module in modules]  # pyright: ignore[reportPrivateUsage]
        super().__init__()
        self._found = self._before
        self._ddp = replicas(model)
        self._broadcast = self._ddp is not None and broadcast_buffers(self._ddp)
        if self._ddp is not None and self._broadcast:
            self._ddp.require_forward_param_sync = False
            self._before = self._read()

    def settle(self) -> None:
        super().settle()
        if self._ddp is not None:
            # A method that averages gradients itself ends without a synchronised backward, so DDP would not broadcast.
            self._ddp.require_forward_param_sync = True

    def discard(self) -> None:
        self.settle()
        self._write(self._before)

    def rollback(self) -> None:
        self._write(self._found)
        if self._ddp is not None:
            self._ddp.require_forward_param_sync = self._broadcast or self._ddp.require_forward_param_sync

    def _read(self) -> _Contents:
        registered = [(buffers, dict(buffers.items())) for buffers in self._modules if len(buffers)]
        if not registered:
            return _NOTHING
        single: list[tuple[_Buffers, str, Tensor]] = []
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        with torch.no_grad():
            for buffers, tensors in registered:
                for name, buffer in tensors.items():
                    if buffer is not None and flattens(buffer):
                        kinds.setdefault((buffer.device, buffer.dtype), []).append(buffer)
                    elif buffer is not None:
                        single.append((buffers, name, buffer.clone()))
            # One copy per kind, because many small copies are slow.
            flat = [
                (members, [member.shape for member in members], multi_tensor.flatten(members))
                for members in kinds.values()
            ]
        return _Contents(registered, flat, single)

    def _write(self, saved: _Contents) -> None:
        known = {id(buffers) for buffers, _ in saved.registered}
        for buffers in self._modules:
            if len(buffers) and id(buffers) not in known:
                _register(buffers, {})
        for buffers, tensors in saved.registered:
            _register(buffers, tensors)
        if not saved.registered:
            return
        with torch.no_grad():
            for members, shapes, together in saved.flat:
                for member, shape in zip(members, shapes, strict=True):
                    if member.shape != shape:  # observers of quantisation resize their buffers in place
                        member.resize_(shape)
                multi_tensor.copy_(members, multi_tensor.unflatten(together, members))
            for buffers, name, copy in saved.single:
                # A copy of the copy, which the next pass may change in place.
                buffers[name] = copy.clone()


_NOTHING = _Contents([], [], [])


def _register(buffers: _Buffers, tensors: _Buffers) -> None:
    """Register the tensors, and no others; item by item, because TorchScript's buffers are no dictionary."""
    for name in dict(buffers.items()).keys() - tensors.keys():
        del buffers[name]
    for name, tensor in tensors.items():
        buffers[name] = tensor


def flattens(buffer: Tensor) -> bool:
    """Return whether the buffer's contents can be copied into, and back from, one long tensor."""
    special = buffer.layout != torch.strided or buffer.is_quantized or buffer.is_nested or buffer.is_inference()
    return type(buffer) is Tensor and not special and 0 not in buffer.stride()

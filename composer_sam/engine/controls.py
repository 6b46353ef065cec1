"""Controls of state that a repeated pass must not change: random streams, buffers, attributes and a host's records.

A control is made before the first pass and saves the state. The step calls ``first_pass_done()`` after the first pass,
``rewind()`` before each further pass, ``settle()`` after the last pass and ``rollback()`` if the step failed. It calls
``discard()`` instead of ``settle()`` if the batch must leave nothing behind but the random numbers it drew. So every
pass sees the same random numbers and the same buffers. After the step, the state is as one ordinary pass would have
left it; after a failure, it is as if the step had never begun.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from composer_sam.engine.streams import RandomStreams
from composer_sam.engine.wrappers import broadcast_buffers, replicas
from composer_sam.vectors import multi_tensor

__all__ = [
    'AttributeControl',
    'BufferControl',
    'Control',
    'RandomControl',
    'end_skipped',
]


class Control(Protocol):
    """The protocol of a control, which guards one kind of state during the passes of a step."""

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

    It does not put back generators that a module makes for itself.
    """

    def __init__(self, devices: set[torch.device]):
        self._streams = RandomStreams(devices)
        self._before = self._streams.read()
        self._after = None

    def first_pass_done(self) -> None:
        self._after = self._streams.read()

    def rewind(self) -> None:
        self._streams.write(self._before)

    def settle(self) -> None:
        if self._after is not None:
            self._streams.write(self._after)

    def discard(self) -> None:
        self.settle()

    def rollback(self) -> None:
        self._streams.write(self._before)


# The tensor registered in each slot; and for every device and data type its buffers and one copy of their contents.
_Contents: TypeAlias = tuple[list[Tensor | None], list[tuple[list[Tensor], Tensor]]]


class BufferControl:
    """The control of all buffers of a module: BatchNorm statistics, counters, spectral norms and any other.

    It puts back both which tensor is registered and what the tensor contains, because modules change buffers in both
    ways. DistributedDataParallel broadcasts rank 0's buffers at the first forward after a synchronised backward. This
    class does it before the first pass, so that all passes begin with the same buffers.
    """

    def __init__(self, model: nn.Module):
        self._slots = [
            (buffers, name)
            for module in model.modules()
            for buffers in [module._buffers]  # pyright: ignore[reportPrivateUsage]
            for name, buffer in buffers.items()
            if buffer is not None
        ]
        self._found = self._before = self._read()
        self._after: _Contents | None = None
        self._ddp = replicas(model)
        self._broadcast = self._ddp is not None and broadcast_buffers(self._ddp)
        if self._ddp is not None and self._broadcast:
            self._ddp.require_forward_param_sync = False
            self._before = self._read()

    def first_pass_done(self) -> None:
        self._after = self._read()

    def rewind(self) -> None:
        self._write(self._before)

    def settle(self) -> None:
        if self._after is not None:
            self._write(self._after)
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

    @torch.no_grad()
    def _read(self) -> _Contents:
        registered = [buffers[name] for buffers, name in self._slots]
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for buffer in registered:
            if buffer is not None:
                kinds.setdefault((buffer.device, buffer.dtype), []).append(buffer)
        # One copy per kind, because many small copies are slow.
        copies = [(members, torch.cat([buffer.reshape(-1) for buffer in members])) for members in kinds.values()]
        return registered, copies

    @torch.no_grad()
    def _write(self, contents: _Contents) -> None:
        registered, copies = contents
        for (buffers, name), buffer in zip(self._slots, registered, strict=True):
            buffers[name] = buffer
        for members, together in copies:
            parts = multi_tensor.split(together, [m.numel() for m in members])
            multi_tensor.copy_(members, [part.view(m.shape) for part, m in zip(parts, members, strict=True)])


class AttributeControl:
    """The control of plain attributes that modules set in their forward: counters, masks, hidden states.

    It covers modules whose ``forward`` is not torch's own, and their attributes that are numbers, strings, None or
    tensors. It does not notice a tensor changed in place, nor changes inside lists and dictionaries.
    """

    _KINDS = (bool, int, float, str, type(None), Tensor)

    def __init__(self, model: nn.Module):
        self._modules = [
            vars(module) for module in model.modules() if not type(module).forward.__module__.startswith('torch.')
        ]
        self._before = [
            {name: value for name, value in attributes.items() if isinstance(value, self._KINDS)}
            for attributes in self._modules
        ]
        # For every module that changed in the first pass: its attributes, their values before and their values after.
        self._changed: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []

    def first_pass_done(self) -> None:
        for attributes, before in zip(self._modules, self._before, strict=True):
            after = {
                name: new
                for name, old in before.items()
                if (new := attributes.get(name, old)) is not old and isinstance(new, self._KINDS)
            }
            if after:
                self._changed.append((attributes, {name: before[name] for name in after}, after))

    def rewind(self) -> None:
        for attributes, before, _ in self._changed:
            attributes.update(before)

    def settle(self) -> None:
        for attributes, _, after in self._changed:
            attributes.update(after)

    def discard(self) -> None:
        self.rewind()

    def rollback(self) -> None:
        for attributes, before in zip(self._modules, self._before, strict=True):
            attributes.update(before)

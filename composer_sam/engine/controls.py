"""What a repeated pass must not disturb: random streams, modules' buffers and attributes, and a host's own records.

A control is made before the first pass and remembers how it found things. The step tells it ``first_pass_done()`` after
the first pass, ``rewind()`` before each further pass, ``settle()`` when the passes are over and ``rollback()`` when the
step failed; ``discard()`` instead of ``settle()`` says that the batch is to leave nothing behind but the random numbers
it drew. So every pass sees the same random numbers and the same buffers, and after the step all is as one ordinary pass
would have left it, or, after a failure, as if the step had never begun.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from composer_sam.engine.streams import RandomStreams
from composer_sam.engine.wrappers import broadcast_buffers, replicas

__all__ = [
    'AttributeControl',
    'BufferControl',
    'Control',
    'RandomControl',
    'end_skipped',
]


class Control(Protocol):
    """One kind of state around a step's passes."""

    def first_pass_done(self) -> None: ...

    def rewind(self) -> None: ...

    def settle(self) -> None: ...

    def discard(self) -> None: ...

    def rollback(self) -> None: ...


def end_skipped(controls: Iterable[Control], discard: bool) -> None:
    """End a step that is skipped: as the first pass left things, or with nothing of the batch but the numbers drawn."""
    for control in controls:
        control.discard() if discard else control.settle()


class RandomControl:
    """The global random streams; see :class:`~composer_sam.engine.streams.RandomStreams`.

    Generators that a module makes for itself go on between passes.
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


# What is registered in each slot, and all contents: for every device and type its buffers and one copy of them.
_Contents: TypeAlias = tuple[list[Tensor | None], list[tuple[list[Tensor], Tensor]]]


class BufferControl:
    """All buffers of a module: BatchNorm statistics and counters of every kind, spectral norms, and any other.

    Both which tensor is registered and what is in it are put back, because modules change buffers either way.
    DistributedDataParallel hands rank 0's buffers to all ranks at the first forward after a synchronised backward. That
    is done here, before the first pass, so that the other passes begin with the same.
    """

    def __init__(self, model: nn.Module):
        self._slots = [
            (module._buffers, name)
            for module in model.modules()
            for name, buffer in module._buffers.items()
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
            # A method that averages itself ends without a synchronised backward, after which nothing is handed out.
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
        # One copy per kind: many small ones would cost more than the buffers are worth.
        copies = [(members, torch.cat([buffer.reshape(-1) for buffer in members])) for members in kinds.values()]
        return registered, copies

    @torch.no_grad()
    def _write(self, contents: _Contents) -> None:
        registered, copies = contents
        for (buffers, name), buffer in zip(self._slots, registered, strict=True):
            buffers[name] = buffer
        for members, together in copies:
            torch._foreach_copy_(members, _unflatten_dense_tensors(together, members))


class AttributeControl:
    """What modules keep of their own forwards in plain attributes: counters, masks they chose, hidden states.

    Only modules whose ``forward`` is not torch's own are looked at, and of them attributes that are numbers, words or
    tensors. A tensor changed in place is not noticed, and neither is what lies in lists and dictionaries.
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
        # For every module that changed in the first pass: its attributes, what they were, and what they became.
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

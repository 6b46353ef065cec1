"""The placement of the weights at w + offset for one pass, and back at w bit for bit.

There are two ways, which give the same bits. *Exchange* writes ``w + offset`` into the offset's memory and points the
parameter at it; restoring points it back and copies nothing. *Copy* saves ``w``, adds the offset in place, and copies
``w`` back; the parameter's address never changes. Exchange is used for ordinary parameters on the CPU, where memory
traffic is the cost. Copy is used for everything else: DTensors (they ignore an assignment to ``.data``), the flat
parameters and views of FSDP1, parameters that share storage, and accelerators, where a captured CUDA graph keeps
reading the old address.

The offset is never subtracted: ``(w + e) - e`` is not ``w`` in floating point, and ranks with different ``e`` drift
apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from composer_sam.engine.wrappers import fsdp1_flattened
from composer_sam.vectors import Layout, Vector, multi_tensor
from composer_sam.vectors.layout import is_dtensor, real

__all__ = ['Placement', 'alone_in_memory', 'exchangeable']

_PLAIN = (nn.Parameter, Tensor)


def exchangeable(parameter: Tensor) -> bool:
    """Return whether the parameter may be pointed at other memory: it must be the only user of its storage."""
    return (
        type(parameter) in _PLAIN
        and parameter.device.type == 'cpu'
        and parameter.layout == torch.strided
        and not parameter.is_complex()
        and not parameter.is_shared()
        and not fsdp1_flattened(parameter)
        and parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    )


def alone_in_memory(parameters: Sequence[Tensor], model: nn.Module | None) -> bool:
    """Return False if a buffer or another parameter of the model is in a parameter's memory.

    It sees w + offset if the weights are copied there, as it would see a step, but not if the parameter is pointed at
    other memory.
    """
    if model is None:
        return True
    own = set(map(id, parameters))
    others = (tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in own)
    taken = {tensor.untyped_storage().data_ptr() for tensor in others if _in_memory(tensor)}
    return not any(p.untyped_storage().data_ptr() in taken for p in parameters if _in_memory(p))


def _in_memory(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided and tensor.device.type == 'cpu' and not is_dtensor(tensor) and tensor.numel() > 0
    )


class Placement:
    """The weights of a layout: at w, or at w + offset during a pass.

    Args:
        layout: the trainable parameters, in the vectors' order.
        exchange: point parameters at other memory where that is safe for all of them; False always copies.
    """

    def __init__(self, layout: Layout, exchange: bool = True):
        self._parameters = layout.parameters
        self._plain = layout.plain
        self._exchange = exchange and all(type(p) in _PLAIN and p.layout == torch.strided for p in layout.parameters)
        self._addresses: list[int] | None = None
        self._alone = False
        self._strides: list[tuple[int, ...]] = []
        self._exchanged: list[tuple[Tensor, Tensor]] = []
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._moved: list[Tensor] = []  # what the parameters are while a pass is paused

    def place(self, offset: Vector) -> None:
        """Put the weights at w + offset. If the offset is donated, its memory is overwritten."""
        # Where a whole step is under autocast, torch keeps the casts of the weights from one pass to the next.
        torch.clear_autocast_cache()
        values, factor, free = offset.take()
        parameters = [self._parameters[where] for where in offset.where]
        if not self._exchanges():
            self._copy(parameters, values, factor)
            return
        # A gradient may lie in memory in another order than its parameter.
        alike = [v.stride() == self._strides[where] for v, where in zip(values, offset.where, strict=True)]
        if all(alike):
            self._point(parameters, values, factor, free)
            return
        triples = list(zip(parameters, values, alike, strict=True))
        self._point([p for p, _, same in triples if same], [v for _, v, same in triples if same], factor, free)
        self._copy([p for p, _, same in triples if not same], [v for _, v, same in triples if not same], factor)

    def _exchanges(self) -> bool:
        """Return whether all parameters may be pointed at other memory; looked up again where one has moved."""
        if not self._exchange:
            return False
        addresses = [parameter.data_ptr() for parameter in self._parameters]
        if addresses != self._addresses:
            self._addresses = None  # an interrupt in the next lines must not leave half of what is known
            taken = [address for address in addresses if address]
            # Of parameters that share a storage, an exchange would untie the one from the other for the pass.
            self._alone = len(set(taken)) == len(taken) and all(map(exchangeable, self._parameters))
            self._strides = [parameter.stride() for parameter in self._parameters]
            self._addresses = addresses
        return self._alone

    def _point(self, parameters: list[Tensor], offsets: list[Tensor], factor: float, free: bool) -> None:
        originals = [parameter.data for parameter in parameters]
        if free:
            places = offsets
            for weight, offset in zip(originals, offsets, strict=True):
                torch.add(weight, offset, alpha=factor, out=offset)
        else:
            places = multi_tensor.add(originals, offsets, factor)
        # Noted before the first parameter moves, so that restore() is correct after an interrupt at any point.
        self._exchanged = list(zip(parameters, originals, strict=True))
        for parameter, place in zip(parameters, places, strict=True):
            parameter.data = place

    @torch.no_grad()
    def _copy(self, parameters: list[Tensor], offsets: list[Tensor], factor: float) -> None:
        targets = self._written(parameters)
        copies = [torch.empty_like(target) for target in targets]
        multi_tensor.copy_(copies, targets)
        self._saved = list(zip(parameters, copies, strict=True))
        # The same kernel as where parameters are pointed at the sum, and so the same bits.
        multi_tensor.add_(targets, offsets, factor)

    def restore(self) -> None:
        """Put the weights back to w; do nothing if they are there already, so it may be called twice."""
        self._moved = []
        if not self._exchanged and not self._saved:
            return
        self._return_to_w()
        # The next pass saves again: between passes the method may use the memory.
        self._exchanged, self._saved = [], []

    def pause(self) -> None:
        """Put the weights at w until :meth:`resume`; do nothing if they are there. It takes the memory of a copy."""
        if self._moved or not (self._exchanged or self._saved):
            return
        self._moved = [parameter.data for parameter, _ in self._exchanged]
        self._moved += [parameter.detach().clone() for parameter, _ in self._saved]
        self._return_to_w()

    @torch.no_grad()
    def resume(self) -> None:
        """Put the weights back where :meth:`pause` found them; do nothing without it."""
        moved, self._moved = self._moved, []
        if not moved:
            return
        torch.clear_autocast_cache()
        exchanged = len(self._exchanged)
        for (parameter, _), place in zip(self._exchanged, moved[:exchanged], strict=True):
            parameter.data = place
        for (parameter, _), place in zip(self._saved, moved[exchanged:], strict=True):
            parameter.copy_(place)

    @torch.no_grad()
    def _return_to_w(self) -> None:
        torch.clear_autocast_cache()
        for parameter, original in self._exchanged:
            parameter.data = original
        if self._saved:
            # Looked up again: FSDP2 moves the parameters into memory of its own in its very first forward.
            multi_tensor.copy_(self._written([p for p, _ in self._saved]), [copy for _, copy in self._saved])

    def _written(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return the tensors to write to for parameters."""
        return parameters if self._plain else [real(parameter) for parameter in parameters]

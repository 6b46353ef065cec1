"""Saving and restoring, bit for bit, everything that a measurement could change."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from composer_sam.engine.attributes import AttributeControl
from composer_sam.engine.controls import flattens
from composer_sam.engine.streams import streams_of
from composer_sam.engine.wrappers import broadcast_buffers, replicas

__all__ = ['ModelState', 'RandomState', 'exact_kernels']

# The seed of the streams in every pass: a module that draws in evaluation mode gets the same numbers each time.
_SEED = 0
_BITS = {4: torch.int32, 8: torch.int64}


class RandomState:
    """The state of the global random streams and of those of the given devices at construction."""

    def __init__(self, devices: set[torch.device]):
        self._streams = streams_of(frozenset(devices))
        self._before = self._streams.read()

    def fix(self) -> None:
        """Set all streams to a fixed seed."""
        random.seed(_SEED)
        np.random.seed(_SEED)  # noqa: NPY002 (the global stream is what libraries draw from)
        # Not torch.manual_seed: it also seeds devices whose state was not saved.
        torch.default_generator.manual_seed(_SEED)
        for device in self._streams.cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(_SEED)

    def restore(self) -> None:
        """Set all streams to their saved state."""
        self._streams.write(self._before)


class ModelState:
    """All that a pass could change of a module, and the random streams of the given devices, at construction.

    That is weights, buffers, gradients, attributes, modes and ``requires_grad`` flags. Weights and buffers are copied.
    Gradients are not copied: ``.grad`` is None until :meth:`restore` puts the same tensors back, so that no pass adds
    to them.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, devices: set[torch.device]):
        self._random = RandomState(devices)
        self._modes = [(module, module.training) for module in model.modules()]
        self._parameters = [
            (parameter, parameter.data, parameter.detach().clone(), parameter.grad, parameter.requires_grad)
            for parameter in model.parameters()
        ]
        # A module may change the values of a buffer, or register another tensor in its place.
        self._buffers = [
            (module._buffers, {name: (buffer, _copied(buffer)) for name, buffer in module._buffers.items()})
            for module in model.modules()
        ]
        self._attributes = AttributeControl(model.modules())
        self._ddp = replicas(model)
        for parameter, *_ in self._parameters:
            parameter.grad = None

    def evaluate(self, model: nn.Module) -> None:
        """Switch to evaluation mode; under DistributedDataParallel copy the buffers of rank 0, as its forward does."""
        if self._ddp is not None:
            broadcast_buffers(self._ddp)
        model.eval()

    def restart(self) -> None:
        """Prepare a pass: it finds the attributes, and draws the random numbers, that every other pass does."""
        self._random.fix()
        self._attributes.rollback()

    def restore(self) -> None:
        """Restore everything that was saved."""
        try:
            self._restore_model()
        finally:
            self._random.restore()

    @torch.no_grad()
    def _restore_model(self) -> None:
        for module, training in self._modes:
            module.training = training
        self._attributes.rollback()
        for buffers, saved in self._buffers:
            for name in dict(buffers.items()).keys() - saved.keys():
                del buffers[name]
            for name, (buffer, copy) in saved.items():
                whole = buffer is None or flattens(buffer)
                buffers[name] = buffer if whole else copy  # what is sparse or quantised cannot be compared or copied to
                if whole and buffer is not None and copy is not None:
                    _put_back(buffer, copy)
        for parameter, data, copy, grad, requires_grad in self._parameters:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            _put_back(parameter, copy)
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _copied(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()


def _put_back(tensor: Tensor, copy: Tensor) -> None:
    """Copy only if the values differ: a write would invalidate every graph that the caller holds on the tensor."""
    width = _BITS.get(tensor.element_size())
    same = torch.equal(tensor, copy) if width is None else torch.equal(_bits(tensor, width), _bits(copy, width))
    if not same:
        tensor.detach().copy_(copy)


def _bits(tensor: Tensor, width: torch.dtype) -> Tensor:
    # Compared as numbers, -0 equals 0, and NaN differs from itself.
    return tensor.detach() if tensor.is_complex() else tensor.detach().view(width)


@contextlib.contextmanager
def exact_kernels(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Select kernels that compute in the precision of the weights, are deterministic and can be differentiated twice.

    Args:
        model: its recurrent layers decide whether cuDNN is used.
        device: the device of the model.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    precision = torch.get_float32_matmul_precision()
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, precision)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_attention)
        torch.set_float32_matmul_precision('highest')
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        if device.type == 'cuda':
            # cuDNN has no backward for recurrent layers in evaluation mode, and no double backward.
            exact: dict[str, Any] = {'benchmark': False, 'deterministic': True, 'allow_tf32': False}
            stack.enter_context(torch.backends.cudnn.flags(enabled=not recurrent, **exact))
        if 'torch._dynamo' in sys.modules:
            # Compiled graphs cannot be differentiated twice. If dynamo is not imported, nothing was compiled.
            stack.enter_context(torch.compiler.set_stance('force_eager'))
        yield

"""One optimizer step as a transaction: the passes a method asks for, at weights put back bit for bit."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from composer_sam.controls import BufferControl, Control, RandomControl
from composer_sam.distributed import Layout, local
from composer_sam.placement import Placement, real
from composer_sam.vectors import Vector

__all__ = ['Direction', 'Pass', 'Passes', 'Step', 'count_passes']

# Method state lies beside the base optimizer's own, under keys no optimizer uses.
MEMORY_PREFIX = 'sharpness_aware.'


@dataclass(frozen=True)
class Pass:
    """A method's request for one forward-backward over the batch.

    Args:
        at: absolute offset from the weights w; ``None`` is w itself. Its memory is used up where it was donated.
        sync: False leaves the gradient of this rank's samples unaveraged, where the model's wrapper can do that
            (DistributedDataParallel); with one process and under FSDP it makes no difference.
    """

    at: Vector | None = None
    sync: bool = True


@dataclass(frozen=True)
class Direction:
    """What a method makes of its gradients.

    Args:
        gradients: handed to the base optimizer in place of the plain gradient.
    """

    gradients: Vector


Passes: TypeAlias = Generator[Pass, Vector, Direction]


class Step:
    """One step of one method: runs its passes, and undoes everything if any of them fails.

    A method sees ``memory`` (what it staged in the last committed step, one vector per name) and ``staged`` (what is
    to be in ``memory`` from the next step on); the rest is the optimizer's. Used as a context manager: leaving it
    before ``commit`` puts weights, buffers, random streams and gradients back as they were when it was made.

    Args:
        direction: the method's generator function: yields a :class:`Pass`, is sent its gradient, returns a
            :class:`Direction`.
        parameters: the trainable parameters, in the optimizer's order.
        state: the base optimizer's state, where the method's memory lies.
        model: the module, for its buffers and its shards.
        controls: what else a repeated pass must not disturb.
        exchange: see :class:`~composer_sam.placement.Placement`.
    """

    def __init__(
        self,
        direction: Any,
        parameters: list[Tensor],
        state: Mapping[Tensor, dict[str, Any]],
        model: nn.Module | None = None,
        controls: tuple[Control, ...] = (),
        exchange: bool = True,
    ):
        self.layout = Layout(parameters, model)
        self.memory = _read_memory(self.layout, state)
        self.staged: dict[str, Vector] = {}
        self.index = -1
        self._state = state
        self._placement = Placement(self.layout.parameters, exchange)
        devices = {parameter.device for parameter in parameters}
        self._controls = (RandomControl(devices), *([] if model is None else [BufferControl(model)]), *controls)
        self._method = direction(self)
        self._gradient: Vector | None = None
        self._direction: Direction | None = None
        self._open = True

    # What the optimizer does with a step.

    def passes(self) -> Iterator[Pass]:
        """The method's passes one after the other, the weights in place for each; the body of the loop must leave the
        pass's gradient in the parameters' ``.grad``."""
        self._drop_gradients()  # a gradient from before the step is not one of its passes'
        while (request := self._advance()) is not None:
            self.index += 1
            if self.index > 0:
                for control in self._controls:
                    control.rewind()
            if request.at is not None:
                self._placement.place(request.at)
            yield request
            if self.index == 0:
                for control in self._controls:
                    control.first_pass_done()
            self._gradient = self._take_gradient()
            self._placement.restore()
        for control in self._controls:
            control.settle()

    @torch.no_grad()
    def write_direction(self) -> None:
        """Put the direction into the parameters' ``.grad`` for the base optimizer."""
        if self._direction is None:
            raise RuntimeError('the direction is not known before all passes are done')
        gradients = self._direction.gradients
        for value, where in zip(gradients.values, gradients.where, strict=True):
            parameter = self.layout.parameters[where]
            parameter.grad = _shaped_like(parameter, value)

    def commit(self) -> None:
        """The base optimizer has stepped: what the method staged becomes its memory, and nothing is undone any more."""
        for name, vector in self.staged.items():
            for value, where in zip(vector.values, vector.where, strict=True):
                parameter = self.layout.parameters[where]
                self._state[parameter][MEMORY_PREFIX + name] = _shaped_like(parameter, value)
        self._close()

    def skip(self) -> None:
        """End the step without an update, as an ordinary step ends whose gradient overflowed: the weights are at w and
        the random streams and buffers are where the first pass left them."""
        self._placement.restore()
        self._drop_gradients()
        for control in self._controls:
            control.settle()
        self._close()

    def rollback(self) -> None:
        """End the step as if it had not begun."""
        self._placement.restore()
        self._drop_gradients()
        for control in self._controls:
            control.rollback()
        self._close()

    def __enter__(self) -> Step:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._open:
            self.rollback()

    # How it does it.

    def _close(self) -> None:
        self._open = False
        self._method.close()
        self._gradient = self._direction = None

    @torch.no_grad()
    def _advance(self) -> Pass | None:
        """Let the method compute until it asks for its next pass (None: it has returned its direction)."""
        gradient, self._gradient = self._gradient, None
        try:
            return next(self._method) if gradient is None else self._method.send(gradient)
        except StopIteration as end:
            self._direction = end.value
            return None

    def _drop_gradients(self) -> None:
        for parameter in self.layout.parameters:
            parameter.grad = None

    def _take_gradient(self) -> Vector:
        """Take the gradients out of the parameters, so that nobody adds to them or zeroes them in place."""
        values, where = [], []
        for place, parameter in enumerate(self.layout.parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout != torch.strided:
                raise ValueError(
                    f'parameter {place} of shape {tuple(parameter.shape)} has a gradient of layout {gradient.layout}: '
                    'only dense gradients are supported; use nn.Embedding(..., sparse=False)'
                )
            values.append(_own_memory(real(gradient.detach()), parameter))
            where.append(place)
            parameter.grad = None
        return Vector(values, where, self.layout)


def count_passes(direction: Any) -> int:
    """The number of passes a method takes, found by running it on one parameter of one element."""
    parameter = nn.Parameter(torch.ones(1))
    step = Step(direction, [parameter], {})
    count = 0
    with step:
        for _ in step.passes():
            parameter.grad = torch.ones(1)
            count += 1
    return count


def _own_memory(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in memory that no later pass writes to.

    With ``gradient_as_bucket_view`` DistributedDataParallel hands out views of its buckets, and fills these again in
    the next pass. FSDP's gradients are views as well, but of memory made anew in every backward.
    """
    if isinstance(parameter, DTensor) or hasattr(parameter, '_fsdp_flattened'):
        return gradient
    alone = gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()
    return gradient if alone else gradient.clone()


def _read_memory(layout: Layout, state: Mapping[Tensor, dict[str, Any]]) -> dict[str, Vector]:
    found: dict[str, tuple[list[Tensor], list[int]]] = {}
    for place, parameter in enumerate(layout.parameters):
        for key, value in state.get(parameter, {}).items():
            if isinstance(key, str) and key.startswith(MEMORY_PREFIX):
                values, where = found.setdefault(key.removeprefix(MEMORY_PREFIX), ([], []))
                values.append(real(value))
                where.append(place)
    return {name: Vector(values, where, layout) for name, (values, where) in found.items()}


def _shaped_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A local tensor of vector mathematics as what the parameter's optimizer expects: complex, or a DTensor."""
    if local(parameter).is_complex():
        value = torch.view_as_complex(value)
    if isinstance(parameter, DTensor):
        return DTensor.from_local(
            value,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    return value

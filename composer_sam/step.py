"""One optimizer step as a transaction: the passes a method asks for, at weights put back bit for bit."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from composer_sam.controls import Control, end_skipped
from composer_sam.distributed import (
    Layout,
    average,
    must_synchronise,
    own_memory,
    placed_like,
    replicas,
    several_processes,
    to_rest,
)
from composer_sam.placement import Placement, real, shaped_like
from composer_sam.selection import Selection, names_of, select
from composer_sam.vectors import Number, PerParameter, Vector, add, each, restrict, scale, to_radius

__all__ = ['PLAIN', 'Direction', 'Method', 'Observer', 'Pass', 'Passes', 'PlainStep', 'Step']

# Method state lies beside the base optimizer's own, under keys no optimizer uses.
MEMORY_PREFIX = 'sharpness_aware.'


@dataclass(frozen=True)
class Pass:
    """A method's request for one forward-backward over the batch.

    Args:
        at: absolute offset from the weights w; ``None`` is w itself. Its memory is used up where it was donated.
        sync: False leaves the gradient of this rank's samples unaveraged, where the model's wrapper can do that
            (DistributedDataParallel); with one process and under FSDP it makes no difference.
        graph: the gradient is asked for with its graph, to be differentiated again. The closure must call
            ``backward(create_graph=True)``.
    """

    at: Vector | None = None
    sync: bool = True
    graph: bool = False


# The one pass of a step that is not perturbed.
PLAIN = Pass()


@dataclass(frozen=True)
class Direction:
    """What a method makes of its gradients.

    Args:
        gradients: handed to the base optimizer in place of the plain gradient.
        decoupled: applied after the base optimizer's step as w <- w - lr * decoupled, with each group's current lr and
            nothing else of the base optimizer.
    """

    gradients: Vector
    decoupled: Vector | None = None


Passes: TypeAlias = Generator[Pass, Vector, Direction]
# Shown the plain gradient and what a step makes of it.
Observer: TypeAlias = Callable[[Vector, Vector], object]


class PlainStep:
    """The base optimizer's own step as a method: one pass, its gradient as it is."""

    parameters: Selection | None = None

    def direction(self, step: Step) -> Passes:
        del step
        return Direction((yield PLAIN))


class Method(Protocol):
    """What a step needs to know of a method."""

    parameters: Selection | None

    def direction(self, step: Step) -> Passes: ...


class Step:
    """One step of one method: runs its passes, and undoes everything if any of them fails.

    Used as a context manager: leaving it before ``commit`` puts weights, buffers, random streams and gradients back as
    they were when it was made.

    Args:
        method: the update rule, its hyper-parameters as they are at this step.
        layout: the trainable parameters, in the optimizer's order, and their shards.
        state: the base optimizer's state, where the method's memory lies.
        model: the module, for its names, its shards and its replicas.
        number: how many steps were taken before.
        exchange: see :class:`~composer_sam.placement.Placement`.
    """

    def __init__(
        self,
        method: Method,
        layout: Layout,
        state: Mapping[Tensor, dict[str, Any]],
        model: nn.Module | None = None,
        number: int = 0,
        exchange: bool = True,
    ):
        self.layout = layout
        self.staged: dict[str, Vector] = {}
        self.number = number
        self.index = -1
        self.observer: Observer | None = None
        self._model = model
        self._state = state
        self._placement = Placement(layout, exchange)
        self._controls: tuple[Control, ...] = ()
        self._selected = None if method.parameters is None else select(method.parameters, layout.parameters, model)
        self._method = method.direction(self)
        self._gradient: Vector | None = None
        self._last: weakref.ref[Tensor] | None = None
        self._direction: Direction | None = None
        self._plain: Vector | None = None
        self._open = True

    # What a method does with a step. Besides: ``staged`` is what is to be its memory from the next step on, a vector
    # per name; ``number`` counts the steps before this.

    @functools.cached_property
    def memory(self) -> dict[str, Vector]:
        """What the method staged in the last step that was taken."""
        return _read_memory(self.layout, self._state)

    def offset(self, x: Vector, rho: Number, epsilon: Number, metric: Vector | None = None) -> Vector:
        """:func:`~composer_sam.vectors.to_radius` on the parameters that may be perturbed: the others stay at w, and
        neither they nor their gradients count in the radius."""
        return to_radius(self.selected(x), rho, epsilon, metric)

    def selected(self, x: Vector) -> Vector:
        """``x`` on the parameters that may be perturbed."""
        return x if self._selected is None else restrict(x, self._selected)

    def weights(self, at: Vector | None = None) -> Vector:
        """The weights w, or w + at. They are read, never written."""
        parameters = self.layout.parameters
        w = Vector([real(parameter.detach()) for parameter in parameters], range(len(parameters)), self.layout)
        return w if at is None else add(at, w)

    def names(self, wanted_by: str) -> list[str]:
        """The parameters' names in the model; ValueError where there are none, saying who wants them."""
        return names_of(self.layout.parameters, self._model, wanted_by)

    def mean(self, x: Vector) -> Vector:
        """The average over ranks of what was computed from unsynchronised gradients, in one coalesced collective.

        ``x`` itself where gradients are never unsynchronised: with one process, and under FSDP.
        """
        ddp = replicas(self._model)
        if ddp is None or dist.get_world_size(ddp.process_group) == 1:
            return x.like(x.values)
        return Vector(*average(x.values, x.where, self.layout, ddp.process_group), self.layout)

    def hessian_product(self, gradient: Vector, v: Vector) -> tuple[Vector, Vector]:
        """The gradient of a pass with ``graph=True`` without its graph, and the Hessian's product with ``v``.

        Raises:
            ValueError: the gradient has no graph, or the model cannot be differentiated twice.
        """
        parameters = [self.layout.parameters[where] for where in gradient.where]
        # An entry without a graph is constant: its row of the Hessian is zero.
        rows = [
            (g, d) for g, d in zip(gradient.values, restrict(v, gradient.where).values, strict=True) if g.requires_grad
        ]
        if not rows:
            raise ValueError('no gradient can be differentiated again: call loss.backward(create_graph=True)')
        outputs, directions = zip(*rows, strict=True)
        try:
            products = torch.autograd.grad(outputs, parameters, directions, allow_unused=True)
        except RuntimeError as error:
            raise ValueError(f'the model cannot be differentiated twice: {error}') from error
        found = [torch.zeros_like(p) if h is None else h for p, h in zip(parameters, products, strict=True)]
        return gradient.like([g.detach() for g in gradient.values]), gradient.like([h.detach() for h in found])

    # What the optimizer does with a step.

    def guard(self, controls: tuple[Control, ...]) -> None:
        """Say what the passes must not disturb; from now on the step answers for putting it back."""
        self._controls = controls

    def passes(self) -> Iterator[Pass]:
        """The method's passes one after the other, the weights in place for each; the body of the loop must leave the
        pass's gradient in the parameters' ``.grad``."""
        self._drop_gradients()  # a gradient from before the step is not one of its passes'
        while (request := self._advance()) is not None:
            self.index += 1
            if self.index > 0:
                for control in self._controls:
                    control.rewind()
            if request.graph:
                self._check_twice_differentiable()
            if not request.sync and must_synchronise(self._model):
                request = replace(request, sync=True)
            if request.at is not None:
                self._placement.place(request.at)
                # Let go of the offset: where w + offset was copied its memory is free during the pass.
                request = replace(request, at=None)
            yield request
            if self.index == 0:
                for control in self._controls:
                    control.first_pass_done()
            self._gradient = self._take_gradient(request.graph)
            self._placement.restore()
            if self.index == 0 and self.observer is not None:
                self._plain = self._kept(self._gradient, request.sync)
        for control in self._controls:
            control.settle()
        if self._plain is not None and self.observer is not None:
            plain, self._plain = self._plain, None
            self.observer(plain, self._whole_direction())

    @torch.no_grad()
    def write_direction(self) -> None:
        """Put the direction into the parameters' ``.grad`` for the base optimizer."""
        for parameter, value in self._entries(self._found().gradients):
            parameter.grad = value

    @torch.no_grad()
    def apply_decoupled(self, groups: list[dict[str, Any]]) -> None:
        """Apply what the direction keeps from the base optimizer, after its step."""
        decoupled = self._found().decoupled
        if decoupled is None:
            return
        lr = {parameter: group['lr'] for group in groups for parameter in group['params']}
        rates = PerParameter(lr[parameter] for parameter in self.layout.parameters)
        moved = decoupled.like([real(self.layout.parameters[where]) for where in decoupled.where])
        add(moved.donate(), scale(decoupled.donate(), each(lambda rate: -rate, rates)))

    def commit(self) -> None:
        """The base optimizer has stepped: what the method staged becomes its memory, and nothing is undone any more."""
        for name, vector in self.staged.items():
            for parameter, value in self._entries(vector):
                self._state[parameter][MEMORY_PREFIX + name] = value
        for parameter, groups in zip(self.layout.parameters, self.layout.groups, strict=True):
            if not groups and hasattr(parameter, '_fsdp_flattened'):
                # Unsharded (NO_SHARD), FSDP1's next forward fails at a gradient in memory that is not its own.
                parameter.grad = None
        self._close()

    def skip(self, discard: bool) -> None:
        """End the step without an update, the weights at w and the random streams where the first pass left them.

        Args:
            discard: put the buffers back too, so that statistics hold nothing of the batch; False leaves them to the
                first pass, as an ordinary step does whose scaled gradient overflowed.
        """
        self._placement.restore()
        self._drop_gradients()
        end_skipped(self._controls, discard)
        self._close()

    def rollback(self) -> None:
        """End the step as if it had not begun."""
        try:
            to_rest(self._model)
        finally:
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
        self._gradient = self._direction = self._plain = None

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

    def _take_gradient(self, graph: bool) -> Vector:
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
            parameter.grad = None
            values.append(gradient)
            where.append(place)
        if not graph:
            values = [value.detach() if value.requires_grad else value for value in values]
        if not self.layout.plain:
            values = [
                real(placed_like(self.layout.parameters[place], v)) for v, place in zip(values, where, strict=True)
            ]
        if several_processes():
            values = [own_memory(v, self.layout.parameters[place]) for v, place in zip(values, where, strict=True)]
        self._check_memory(values, where)
        return Vector(values, where, self.layout)

    @torch.no_grad()
    def _kept(self, gradient: Vector, synchronised: bool) -> Vector:
        """A copy of the first gradient, which the method may use up, averaged over ranks."""
        copied = gradient.like([value.detach().clone() for value in gradient.values])
        return copied if synchronised else self.mean(copied)

    @torch.no_grad()
    def _whole_direction(self) -> Vector:
        """What replaces the gradient, with the part that goes past the base optimizer."""
        direction = self._found()
        return direction.gradients if direction.decoupled is None else add(direction.gradients, direction.decoupled)

    def _check_twice_differentiable(self) -> None:
        """Raise ValueError before a pass whose gradient could not be differentiated again."""
        flattened = any(hasattr(parameter, '_fsdp_flattened') for parameter in self.layout.parameters)
        if self.layout.sharded or flattened or not self.layout.plain:
            raise ValueError('second derivatives of sharded (FSDP) or complex parameters are not supported')

    def _check_memory(self, values: list[Tensor], where: list[int]) -> None:
        """Raise ValueError where a pass left no gradient, or one in memory that something else is in."""
        if not values:
            if self.layout.parameters and not self.layout.sharded:
                raise ValueError('no parameter has a gradient after the pass: the closure must call backward()')
            return
        address = values[0].data_ptr()
        last = None if self._last is None else self._last()
        overwritten = last is not None and last.data_ptr() == address
        if address and (overwritten or address == real(self.layout.parameters[where[0]]).data_ptr()):
            raise ValueError(
                'two passes left their gradients in the same memory, as a captured CUDA graph does: put copies into '
                '.grad, for example parameter.grad = static_gradient.clone()'
            )
        # An object of its own: alive as long as the method holds the gradient, whoever else holds its memory.
        values[0] = values[0].view_as(values[0])
        self._last = weakref.ref(values[0])

    def _found(self) -> Direction:
        if self._direction is None:
            raise RuntimeError('the direction is not known before all passes are done')
        return self._direction

    def _entries(self, vector: Vector) -> list[tuple[Tensor, Tensor]]:
        """Parameters and the vector's tensors, these in the form the base optimizer expects."""
        pairs = zip(vector.values, vector.where, strict=True)
        return [
            (self.layout.parameters[where], shaped_like(self.layout.parameters[where], value)) for value, where in pairs
        ]


def _read_memory(layout: Layout, state: Mapping[Tensor, dict[str, Any]]) -> dict[str, Vector]:
    found: dict[str, tuple[list[Tensor], list[int]]] = {}
    for place, parameter in enumerate(layout.parameters):
        for key, value in state.get(parameter, {}).items():
            if isinstance(key, str) and key.startswith(MEMORY_PREFIX):
                values, where = found.setdefault(key.removeprefix(MEMORY_PREFIX), ([], []))
                values.append(real(value))
                where.append(place)
    return {name: Vector(values, where, layout) for name, (values, where) in found.items()}

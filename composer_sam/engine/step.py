"""The step as a rule sees it: what the rule may use to compute its direction."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from composer_sam.engine.selection import Selection, names_of, select
from composer_sam.engine.wrappers import group_of, replicas
from composer_sam.vectors import Layout, Number, Vector, add, norm, restrict, to_radius
from composer_sam.vectors.layout import average, real

__all__ = ['MEMORY_PREFIX', 'Step']

# A method's memory is in the base optimizer's state, under keys that no optimizer uses.
MEMORY_PREFIX = 'sharpness_aware.'


class Step:
    """One step, as its rule sees it: vectors only, never parameters, gradients or the base optimizer.

    Args:
        layout: the trainable parameters, in the optimizer's order, and their shards.
        state: the base optimizer's state, which also holds the method's memory.
        model: the module, for parameter names and for averages over replicas.
        number: number of steps taken before.
        selection: which parameters may be perturbed; None for all.

    Attributes:
        number (int): number of steps taken before.
        staged (dict[str, Vector]): the method's memory from the next step on, one vector per name.
        gradient_norm (Tensor | None): the norm of the vector that the first radius was measured along, for the log.
    """

    def __init__(
        self,
        layout: Layout,
        state: Mapping[Tensor, dict[str, Any]],
        model: nn.Module | None = None,
        number: int = 0,
        selection: Selection | None = None,
    ):
        self.layout = layout
        self.number = number
        self.staged: dict[str, Vector] = {}
        self.gradient_norm: Tensor | None = None
        self.model = model
        self.state = state
        self._selected = None if selection is None else select(selection, layout.parameters, model)

    @functools.cached_property
    def memory(self) -> dict[str, Vector]:
        """The vectors that the method staged in the last step that was taken."""
        found: dict[str, tuple[list[Tensor], list[int]]] = {}
        for place, parameter in enumerate(self.layout.parameters):
            for key, value in self.state.get(parameter, {}).items():
                if str(key).startswith(MEMORY_PREFIX):  # an optimizer may use keys that are not strings
                    values, where = found.setdefault(key.removeprefix(MEMORY_PREFIX), ([], []))
                    values.append(real(value))
                    where.append(place)
        return {name: Vector(values, where, self.layout) for name, (values, where) in found.items()}

    def offset(self, x: Vector, rho: Number, epsilon: Number, metric: Vector | None = None) -> Vector:
        """Return :func:`~composer_sam.vectors.to_radius` of ``x`` on the parameters that may be perturbed.

        The other parameters stay at w; they and their gradients do not count in the radius.
        """
        chosen = self.selected(x)
        if metric is not None:
            return to_radius(chosen, rho, epsilon, metric)
        length = norm(chosen)
        if self.gradient_norm is None:
            self.gradient_norm = length
        return to_radius(chosen, rho, epsilon, length=length)

    def selected(self, x: Vector) -> Vector:
        """Return ``x`` on the parameters that may be perturbed."""
        return x if self._selected is None else restrict(x, self._selected)

    def weights(self, at: Vector | None = None) -> Vector:
        """Return the weights w, or w + at. They may be read, never written."""
        parameters = self.layout.parameters
        w = Vector([real(parameter.detach()) for parameter in parameters], range(len(parameters)), self.layout)
        return w if at is None else add(at, w)

    def names(self, wanted_by: str) -> list[str]:
        """Return the parameters' names in the model; if there are none, raise ValueError that names ``wanted_by``."""
        return names_of(self.layout.parameters, self.model, wanted_by)

    def mean(self, x: Vector) -> Vector:
        """Return the average over ranks of a vector from unsynchronised gradients, by one coalesced collective.

        Return ``x`` unchanged where gradients are never unsynchronised: with one process, and under FSDP.
        """
        ddp = replicas(self.model)
        if ddp is None:
            return x.like(x.values)
        group = group_of(ddp)
        if dist.get_world_size(group) == 1:
            return x.like(x.values)
        return Vector(*average(x.values, x.where, self.layout, group), self.layout)

    def hessian_product(self, gradient: Vector, v: Vector) -> tuple[Vector, Vector]:
        """Return the gradient of a pass with ``graph=True``, without its graph, and the Hessian's product with ``v``.

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
            products = torch.autograd.grad(outputs, parameters, directions, materialize_grads=True)
        except RuntimeError as error:
            raise ValueError(f'the model cannot be differentiated twice: {error}') from error
        plain, product = ([tensor.detach() for tensor in tensors] for tensors in (gradient.values, products))
        return gradient.like(plain), gradient.like(product)

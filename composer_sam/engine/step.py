"""What a rule may ask for while it computes its direction."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from composer_sam.engine.selection import Selection, names_of, select
from composer_sam.engine.wrappers import replicas
from composer_sam.vectors import Layout, Number, Vector, add, restrict, to_radius
from composer_sam.vectors.layout import average, real

__all__ = ['MEMORY_PREFIX', 'Step']

# A method's memory lies beside the base optimizer's own state, under keys no optimizer uses.
MEMORY_PREFIX = 'sharpness_aware.'


class Step:
    """One step, as its rule sees it: vectors only, never parameters, gradients or the base optimizer.

    Args:
        layout: the trainable parameters, in the optimizer's order, and their shards.
        state: the base optimizer's state, where the method's memory lies.
        model: the module, for its names and its replicas.
        number: how many steps were taken before.
        selection: which parameters may be perturbed; None for all.

    Attributes:
        number (int): how many steps were taken before.
        staged (dict[str, Vector]): what is to be the method's memory from the next step on, a vector per name.
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
        self.model = model
        self.state = state
        self._selected = None if selection is None else select(selection, layout.parameters, model)

    @functools.cached_property
    def memory(self) -> dict[str, Vector]:
        """What the method staged in the last step that was taken."""
        found: dict[str, tuple[list[Tensor], list[int]]] = {}
        for place, parameter in enumerate(self.layout.parameters):
            for key, value in self.state.get(parameter, {}).items():
                if isinstance(key, str) and key.startswith(MEMORY_PREFIX):  # other optimizers may use any keys
                    values, where = found.setdefault(key.removeprefix(MEMORY_PREFIX), ([], []))
                    values.append(real(value))
                    where.append(place)
        return {name: Vector(values, where, self.layout) for name, (values, where) in found.items()}

    def offset(self, x: Vector, rho: Number, epsilon: Number, metric: Vector | None = None) -> Vector:
        """:func:`~composer_sam.vectors.to_radius` on the parameters that may be perturbed.

        The others stay at w, and neither they nor their gradients count in the radius.
        """
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
        return names_of(self.layout.parameters, self.model, wanted_by)

    def mean(self, x: Vector) -> Vector:
        """The average over ranks of what was computed from unsynchronised gradients, in one coalesced collective.

        ``x`` itself where gradients are never unsynchronised: with one process, and under FSDP.
        """
        ddp = replicas(self.model)
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

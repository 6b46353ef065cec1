"""The step as a rule sees it: what the rule may use to compute its direction."""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from composer_sam.engine.base_optimizer import coupled_decay, momentum
from composer_sam.engine.outputs import OutputGradients
from composer_sam.engine.selection import Multipliers, Selection, factors, names_of, select
from composer_sam.engine.wrappers import group_of, replicas, sharded_like
from composer_sam.vectors import Layout, Number, PerParameter, Vector, add, norm, restrict, scale, to_radius
from composer_sam.vectors.layout import average, largest, real

__all__ = ['MEMORY_PREFIX', 'Step']

# A method's memory is in the base optimizer's state, under keys that no optimizer uses.
MEMORY_PREFIX = 'sharpness_aware.'


class Step:
    """One step, as its rule sees it: vectors only, never parameters, gradients or the base optimizer.

    Args:
        layout: the trainable parameters, in the optimizer's order, and their shards.
        base_optimizer: the base optimizer; its state also holds the method's memory. None: there is none.
        model: the module, for parameter names and for averages over replicas.
        number: number of steps taken before.
        selection: which parameters may be perturbed; None for all.
        multipliers: factors of parameters, by regular expressions for their names; None for none.

    Attributes:
        number (int): number of steps taken before.
        staged (dict[str, Vector]): what changes in the method's memory with this step, one vector per name.
        staged_numbers (dict[str, float]): the same for single numbers, which must be equal on all ranks.
        gradient_norm (Tensor | None): the norm of the vector that the first radius was measured along, for the log.
    """

    def __init__(
        self,
        layout: Layout,
        base_optimizer: Optimizer | None = None,
        model: nn.Module | None = None,
        number: int = 0,
        selection: Selection | None = None,
        multipliers: Multipliers | None = None,
    ):
        self.layout = layout
        self.number = number
        self.staged: dict[str, Vector] = {}
        self.staged_numbers: dict[str, float] = {}
        self.gradient_norm: Tensor | None = None
        self.model = model
        self.state: MutableMapping[Tensor, dict[str, Any]] = {} if base_optimizer is None else base_optimizer.state
        self._base = base_optimizer
        self._selected = None if selection is None else select(selection, layout.parameters, model)
        self._factors = None if multipliers is None else factors(multipliers, layout.parameters, model)

    @functools.cached_property
    def memory(self) -> dict[str, Vector]:
        """The vectors that the method has staged, each as last staged. They may be read, never written."""
        found: dict[str, tuple[list[Tensor], list[int]]] = {}
        for place, parameter in enumerate(self.layout.parameters):
            for key, value in self.state.get(parameter, {}).items():
                # An optimizer may use keys that are not strings.
                if str(key).startswith(MEMORY_PREFIX) and isinstance(value, Tensor):
                    self.state[parameter][key] = value = sharded_like(value, parameter)
                    values, where = found.setdefault(key.removeprefix(MEMORY_PREFIX), ([], []))
                    values.append(real(value))
                    where.append(place)
        return {name: Vector(values, where, self.layout) for name, (values, where) in found.items()}

    @functools.cached_property
    def numbers(self) -> dict[str, float]:
        """The numbers that the method staged."""
        return {
            key.removeprefix(MEMORY_PREFIX): value
            for parameter in self.layout.parameters
            for key, value in self.state.get(parameter, {}).items()
            if str(key).startswith(MEMORY_PREFIX) and isinstance(value, float)
        }

    def momentum(self) -> Vector | None:
        """Return the base optimizer's momentum, None while there is none yet. It may be read, never written."""
        return momentum(self.state, self.layout)

    def coupled_decay(self) -> PerParameter | None:
        """Return the weight decay that the base optimizer adds to the gradient; None if it adds none."""
        return None if self._base is None else coupled_decay(self._base, self.layout)

    def output_gradients(self, name: str | None) -> OutputGradients:
        """Return what keeps the loss's gradient at the model's outputs in a pass that is given it."""
        if self.model is None:
            raise ValueError('the gradient at the outputs needs the model: pass model= to SharpnessAwareOptimizer')
        # DistributedDataParallel may return copies of its module's outputs: a loss made inside is not made of these.
        ddp = replicas(self.model)
        return OutputGradients(self.model if ddp is None else cast(nn.Module, ddp.module), name)  # pyright: ignore

    def offset(self, x: Vector, rho: Number, epsilon: Number, metric: Vector | None = None) -> Vector:
        """Return :func:`~composer_sam.vectors.to_radius` of :meth:`perturbed` of ``x``."""
        chosen = self.perturbed(x)
        if metric is not None:
            return to_radius(chosen, rho, epsilon, metric)
        length = norm(chosen)
        if self.gradient_norm is None:
            self.gradient_norm = length
        return to_radius(chosen, rho, epsilon, length=length)

    def perturbed(self, x: Vector) -> Vector:
        """Return ``x`` on the parameters that may be perturbed, times their multipliers.

        The other parameters stay at w; they and their gradients do not count in the radius.
        """
        chosen = self.selected(x)
        return chosen if self._factors is None else scale(chosen, self._factors)

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

    def agreed(self, number: Tensor) -> float:
        """Return the largest value of a number on any rank, for a decision that all ranks must make alike.

        It waits for the device, and takes a reduction of one number where the model is replicated.
        """
        return (number if replicas(self.model) is None else largest(number)).item()

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

"""Lines and planes through weight space: where a loss landscape is evaluated, and what it is called there.

A :class:`Subspace` turns one or two coordinates into the weights of a model. :class:`Around` leaves one set of weights
along directions, :class:`Through` passes through two or three of them. Nothing here computes a loss of a grid; that is
:mod:`composer_sam.landscapes.grid`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from composer_sam.diagnostics.hessian import top_eigenvalues

__all__ = [
    'Around',
    'Mark',
    'Subspace',
    'Through',
    'Weights',
    'grid_axis',
    'hessian_directions',
    'random_directions',
    'weights_of',
]

Direction = dict[str, Tensor]

_COLLINEAR = 1e-6  # relative distance from a line below which three checkpoints span no plane


@dataclass(frozen=True, eq=False)
class Weights:
    """What a model computes with.

    Attributes:
        parameters: By name, frozen ones included, tied ones once.
        buffers: The floating-point ones by name, such as BatchNorm's running statistics.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


def weights_of(model: nn.Module) -> Weights:
    """A copy of the weights ``model`` has now."""
    return Weights(
        {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()},
    )


@dataclass(frozen=True)
class Mark:
    """A checkpoint, drawn as a point.

    Attributes:
        label: What it is called.
        at: Its coordinates.
        loss: There; not a number before it has been evaluated.
        accuracy: Likewise, in [0, 1]; None where there is none to speak of.
    """

    label: str
    at: tuple[float, ...]
    loss: float = math.nan
    accuracy: float | None = None


@dataclass(frozen=True, eq=False)
class Subspace:
    """A line or plane of weights.

    Attributes:
        axes: What the coordinates are, with their unit.
        marks: The checkpoints that lie in it.
    """

    axes: tuple[str, ...]
    marks: tuple[Mark, ...]

    def weights(self, at: Sequence[float]) -> dict[str, Tensor]:
        """All parameters and floating-point buffers by name at the given coordinates."""
        raise NotImplementedError

    def tensors(self) -> Iterator[Tensor]:
        """All it is made of, in a fixed order."""
        raise NotImplementedError

    def box(self, reach: float) -> tuple[tuple[float, float], ...]:
        """The range of every axis, for a picture that reaches so far."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Around(Subspace):
    r"""The weights around a point, along directions.

    .. math::
        w(x, y) = w + x \, u + y \, v

    At the coordinates zero these are the weights themselves, bit for bit. Buffers stay as they are.

    Attributes:
        origin: The weights :math:`w`.
        directions: :math:`u` and :math:`v`; parameters that one of them leaves out do not move along it.
    """

    origin: Weights
    directions: tuple[Direction, ...]

    @classmethod
    def of(cls, model: nn.Module, directions: Sequence[Direction], axes: Sequence[str], label: str) -> Around:
        """The weights around those that ``model`` has now, which are called ``label``."""
        mark = Mark(label, (0.0,) * len(directions))
        return cls(tuple(axes), (mark,), weights_of(model), tuple(directions))

    def weights(self, at: Sequence[float]) -> dict[str, Tensor]:
        moved = {**self.origin.parameters, **self.origin.buffers}
        for factor, direction in zip(at, self.directions, strict=True):
            if factor != 0:  # so that the weights themselves are among the points, bit for bit
                for name, part in direction.items():
                    moved[name] = torch.add(moved[name], part, alpha=factor)
        return moved

    def tensors(self) -> Iterator[Tensor]:
        yield from (*self.origin.parameters.values(), *self.origin.buffers.values())
        for direction in self.directions:
            yield from direction.values()

    def box(self, reach: float) -> tuple[tuple[float, float], ...]:
        return ((-reach, reach),) * len(self.directions)


@dataclass(frozen=True, eq=False)
class Through(Subspace):
    r"""The line through two sets of weights, or the plane through three.

    .. math::
        w(a) = (1 - a) \, w_0 + a \, w_1,
        \qquad
        w(x, y) = w_0 + x \, u + y \, v

    with :math:`u, v` the Gram-Schmidt basis of :math:`w_1 - w_0, w_2 - w_0` over all parameters, so that distances and
    angles in the plane's picture are those of weight space. Both are evaluated as weighted means of the corners with
    weights that sum to 1, and so are the corners themselves, bit for bit, at their own coordinates.

    Floating-point buffers (BatchNorm's running statistics) are averaged with the same weights. Beyond the corners,
    where a weight is negative and an averaged variance could be too, they stay those of the nearest average: negative
    weights are set to zero and the others scaled to sum to 1. An average of running statistics is not what the
    averaged weights would have gathered in training; ``recalibrate`` of :func:`composer_sam.landscapes.grid.evaluate`
    gathers them anew.

    Attributes:
        corners: Two or three sets of weights of one architecture.

    Reference:
        Goodfellow, Vinyals and Saxe, "Qualitatively Characterizing Neural Network Optimization Problems", ICLR 2015,
        https://arxiv.org/abs/1412.6544 (the line); Garipov, Izmailov, Podoprikhin, Vetrov and Wilson, "Loss Surfaces,
        Mode Connectivity, and Fast Ensembling of DNNs", NeurIPS 2018, https://arxiv.org/abs/1802.10026 (the plane)
    """

    corners: tuple[Weights, ...]

    @classmethod
    def of(cls, corners: Sequence[Weights], labels: Sequence[str]) -> Through:
        """The line or plane through the ``corners``, which are called by the ``labels``."""
        first, second = labels[:2]
        length, slant, height = _triangle(corners, labels)
        if len(corners) == 2:
            places: list[tuple[float, ...]] = [(0.0,), (1.0,)]
            axes: tuple[str, ...] = (f'position from {first} (0) to {second} (1)',)
        else:
            places = [(0.0, 0.0), (length, 0.0), (slant, height)]
            axes = (f'distance from {first} towards {second}', f'distance from the line towards {labels[2]}')
        marks = tuple(Mark(label, at) for label, at in zip(labels, places, strict=True))
        return cls(axes, marks, tuple(corners))

    def coefficients(self, at: Sequence[float]) -> tuple[float, ...]:
        """The weight of every corner in the mean."""
        if len(self.corners) == 2:
            return 1 - at[0], at[0]
        (length, _), (slant, height) = self.marks[1].at, self.marks[2].at
        third = at[1] / height
        second = (at[0] - third * slant) / length
        return 1 - second - third, second, third

    def weights(self, at: Sequence[float]) -> dict[str, Tensor]:
        factors = self.coefficients(at)
        kept = [max(0.0, factor) for factor in factors]
        convex = [factor / sum(kept) for factor in kept]
        return {
            **_combine([corner.parameters for corner in self.corners], factors),
            **_combine([corner.buffers for corner in self.corners], convex),
        }

    def tensors(self) -> Iterator[Tensor]:
        for corner in self.corners:
            yield from (*corner.parameters.values(), *corner.buffers.values())

    def box(self, reach: float) -> tuple[tuple[float, float], ...]:
        """The box of the corners and a margin of ``reach`` times its longest side all around."""
        sides = [(min(places), max(places)) for places in zip(*(mark.at for mark in self.marks), strict=True)]
        margin = reach * max(high - low for low, high in sides)
        return tuple((low - margin, high + margin) for low, high in sides)


def random_directions(model: nn.Module, seed: int, count: int = 1) -> list[Direction]:
    r"""Filter-normalised random directions.

    .. math::
        d_{i,j} \leftarrow \frac{d_{i,j}}{\lVert d_{i,j} \rVert} \, \lVert w_{i,j} \rVert
        \qquad d \sim \mathcal{N}(0, I)

    for filter :math:`j` of layer :math:`i`: the slices along the first axis of every trainable parameter of two or more
    dimensions, which are the filters of a convolution and the rows of a linear layer. So a step of 1 changes every
    filter by its own norm, and networks of different scale can be compared. Parameters of fewer dimensions (biases,
    normalisation) do not move and are left out, as in the authors' code by default. Several directions are drawn one
    after the other and not made orthogonal to each other, as published; in so many dimensions they almost are.

    Args:
        model: The network, at the weights the directions are scaled to.
        seed: Of the draws, which are the same for all networks of one architecture, on every device.
        count: How many directions.

    Reference:
        Li, Xu, Taylor, Studer and Goldstein, "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018,
        https://arxiv.org/abs/1712.09913
    """
    generator = torch.Generator().manual_seed(seed)
    filtered = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim >= 2
    }
    if not filtered:
        raise ValueError('random directions need a trainable parameter of two or more dimensions; the model has none')
    return [{name: _filterwise(weight, generator) for name, weight in filtered.items()} for _ in range(count)]


def hessian_directions(
    model: nn.Module, loss: Any, batches: Iterable[Any], count: int = 1, **options: Any
) -> tuple[list[Direction], list[float]]:
    r"""The eigenvectors of the Hessian with the largest eigenvalues, and these.

    Each has norm 1 over all trainable parameters, so coordinates along it are distances in weight space: the unit of
    SAM's rho. The network's own scale is not taken out as it is by filter normalisation. Near the weights

    .. math::
        L(w + x v) \approx L(w) + x \, \nabla L(w)^\top v + \tfrac{1}{2} \lambda x^2

    An eigenvector's sign is arbitrary; here its element of largest magnitude is positive.

    Args:
        model: The network.
        loss: As for :class:`composer_sam.diagnostics.objective.Objective`.
        batches: The samples the Hessian is of.
        count: How many.
        options: Further arguments of :func:`composer_sam.diagnostics.hessian.top_eigenvalues`.

    Reference:
        Yao, Gholami, Keutzer and Mahoney, "PyHessian: Neural Networks Through the Lens of the Hessian", IEEE Big Data
        2020, https://arxiv.org/abs/1912.07145
    """
    found = top_eigenvalues(model, loss, batches, k=count, **options)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [dict(zip(names, vector, strict=True)) for vector in found.vectors], list(found.values)


def _filterwise(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian tensor whose slices along the first axis have the norms of those of ``weight``."""
    drawn = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
    rows = drawn.flatten(1)
    rows *= weight.flatten(1).norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True)
    return drawn


def _combine(tensors: Sequence[dict[str, Tensor]], factors: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sums, name by name; what has no weight is left out, so that a corner is itself bit for bit."""
    (first, factor), *others = [pair for pair in zip(tensors, factors, strict=True) if pair[1] != 0]
    combined = {}
    for name, tensor in first.items():
        total = tensor * factor
        for further, weight in others:
            total.add_(further[name], alpha=weight)
        combined[name] = total
    return combined


def _triangle(corners: Sequence[Weights], labels: Sequence[str]) -> tuple[float, float, float]:
    """Of the first three corners: the distance of two, and the third's coordinates along and across their line."""
    names = corners[0].parameters
    edges = [
        {name: corner.parameters[name].double() - corners[0].parameters[name].double() for name in names}
        for corner in corners[1:]
    ]
    length = math.sqrt(_inner(edges[0], edges[0]))
    if length == 0:
        raise ValueError(f'{labels[0]} and {labels[1]} have the same weights; choose two that differ')
    if len(edges) == 1:
        return length, 0.0, 0.0
    slant = _inner(edges[1], edges[0]) / length
    across = {name: edges[1][name] - edges[0][name] * (slant / length) for name in names}
    height = math.sqrt(_inner(across, across))
    if not height > _COLLINEAR * length:
        raise ValueError(f'{", ".join(labels)} lie on one line of weights and span no plane; use --dims 1 with two')
    return length, slant, height


def _inner(a: Direction, b: Direction) -> float:
    return float(sum((a[name] * b[name]).sum() for name in a))


def grid_axis(low: float, high: float, resolution: int) -> np.ndarray:
    """``resolution`` evenly spaced coordinates; where the range is symmetric so are they, bit for bit."""
    steps = np.linspace(-1, 1, resolution)
    return (low + high) / 2 + (high - low) / 2 * ((steps - steps[::-1]) / 2)

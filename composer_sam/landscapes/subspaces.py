"""Lines and planes through weight space, on which a loss landscape is evaluated.

A :class:`Subspace` turns one or two coordinates into the weights of a model. :class:`Around` starts at one set of
weights and follows directions; :class:`Through` contains two or three sets of weights. The losses are computed by
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

_COLLINEAR = 1e-6  # relative distance from the line of two checkpoints below which a third one spans no plane


@dataclass(frozen=True, eq=False)
class Weights:
    """The parameters and buffers a model computes with.

    Attributes:
        parameters: all parameters by name, frozen ones included, tied ones once.
        buffers: the floating-point buffers by name, such as BatchNorm's running statistics.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


def weights_of(model: nn.Module) -> Weights:
    """Return a copy of the weights of ``model``."""
    return Weights(
        {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()},
    )


@dataclass(frozen=True)
class Mark:
    """A checkpoint in a subspace, drawn as a point.

    Attributes:
        label: its name.
        at: its coordinates.
        loss: its loss; not a number before it has been evaluated.
        accuracy: its accuracy, in [0, 1]; None where the network is no classifier.
    """

    label: str
    at: tuple[float, ...]
    loss: float = math.nan
    accuracy: float | None = None


@dataclass(frozen=True, eq=False)
class Subspace:
    """A line or plane of weights.

    Attributes:
        axes: the names of the coordinates, with their units.
        marks: the checkpoints that lie in it.
    """

    axes: tuple[str, ...]
    marks: tuple[Mark, ...]

    def weights(self, at: Sequence[float]) -> dict[str, Tensor]:
        """Return all parameters and floating-point buffers by name at the given coordinates."""
        raise NotImplementedError

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors the subspace is made of, in a fixed order."""
        raise NotImplementedError

    def box(self, reach: float) -> tuple[tuple[float, float], ...]:
        """Return the range of every axis for a picture of the given reach."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Around(Subspace):
    r"""The weights around a point, along one or two directions.

    .. math::
        w(x, y) = w + x \, u + y \, v

    At the coordinates zero these are the weights :math:`w`, bit for bit. Buffers do not change.

    Attributes:
        origin: the weights :math:`w`.
        directions: :math:`u` and :math:`v`; a parameter that a direction leaves out does not move along it.
    """

    origin: Weights
    directions: tuple[Direction, ...]

    @classmethod
    def of(cls, model: nn.Module, directions: Sequence[Direction], axes: Sequence[str], label: str) -> Around:
        """Make the subspace around the weights of ``model``, which get the name ``label``."""
        mark = Mark(label, (0.0,) * len(directions))
        return cls(tuple(axes), (mark,), weights_of(model), tuple(directions))

    def weights(self, at: Sequence[float]) -> dict[str, Tensor]:
        moved = {**self.origin.parameters, **self.origin.buffers}
        for factor, direction in zip(at, self.directions, strict=True):
            if factor != 0:  # so that the origin is one of the points, bit for bit
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
    angles in a picture of the plane are those of weight space. Both are evaluated as means of the corners with
    coefficients that sum to 1. At the coordinates of a corner the result is that corner, bit for bit.

    Floating-point buffers (BatchNorm's running statistics) are averaged with the same coefficients. Beyond the corners
    a coefficient is negative, and an averaged variance could be negative too: for buffers negative coefficients are set
    to zero, and the others are scaled to sum to 1. Averaged running statistics differ from the statistics that the
    averaged weights would have gathered in training; ``recalibrate`` of
    :func:`composer_sam.landscapes.grid.evaluate` computes them from the samples.

    Attributes:
        corners: two or three sets of weights of one architecture.

    Reference:
        Goodfellow, Vinyals and Saxe, "Qualitatively Characterizing Neural Network Optimization Problems", ICLR 2015,
        https://arxiv.org/abs/1412.6544 (the line); Garipov, Izmailov, Podoprikhin, Vetrov and Wilson, "Loss Surfaces,
        Mode Connectivity, and Fast Ensembling of DNNs", NeurIPS 2018, https://arxiv.org/abs/1802.10026 (the plane)
    """

    corners: tuple[Weights, ...]

    @classmethod
    def of(cls, corners: Sequence[Weights], labels: Sequence[str]) -> Through:
        """Make the line or plane through ``corners``, which get the names ``labels``."""
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
        """Return the coefficient of every corner in the mean."""
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
        """Return the box of the corners, with a margin of ``reach`` times its longest side on all sides."""
        sides = [(min(places), max(places)) for places in zip(*(mark.at for mark in self.marks), strict=True)]
        margin = reach * max(high - low for low, high in sides)
        return tuple((low - margin, high + margin) for low, high in sides)


def random_directions(model: nn.Module, seed: int, count: int = 1) -> list[Direction]:
    r"""Draw filter-normalised random directions.

    .. math::
        d_{i,j} \leftarrow \frac{d_{i,j}}{\lVert d_{i,j} \rVert} \, \lVert w_{i,j} \rVert
        \qquad d \sim \mathcal{N}(0, I)

    for filter :math:`j` of layer :math:`i`. The filters are the slices along the first axis of every trainable
    parameter of two or more dimensions: the filters of a convolution and the rows of a linear layer. A step of 1
    changes every filter by its own norm, so that networks of different scale can be compared. Parameters of fewer
    dimensions (biases, normalisation) do not move and are left out, as in the authors' code by default. Several
    directions are drawn one after the other and are not made orthogonal, as published; in so many dimensions they
    almost are.

    Args:
        model: the network, at the weights the directions are scaled to.
        seed: the seed of the draws, which are the same for all networks of one architecture, on every device.
        count: the number of directions.

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
    r"""Return the eigenvectors of the Hessian with the largest eigenvalues, and the eigenvalues.

    Each eigenvector has norm 1 over all trainable parameters, so that coordinates along it are distances in weight
    space, the unit of SAM's rho. Unlike filter normalisation this does not remove the scale of the network. Near the
    weights

    .. math::
        L(w + x v) \approx L(w) + x \, \nabla L(w)^\top v + \tfrac{1}{2} \lambda x^2

    The sign of an eigenvector is arbitrary; here its element of largest magnitude is positive.

    Args:
        model: the network.
        loss: as for :class:`composer_sam.diagnostics.objective.Objective`.
        batches: the samples of the loss.
        count: the number of eigenvectors.
        options: further arguments of :func:`composer_sam.diagnostics.hessian.top_eigenvalues`.

    Reference:
        Yao, Gholami, Keutzer and Mahoney, "PyHessian: Neural Networks Through the Lens of the Hessian", IEEE Big Data
        2020, https://arxiv.org/abs/1912.07145
    """
    found = top_eigenvalues(model, loss, batches, k=count, **options)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [dict(zip(names, vector, strict=True)) for vector in found.vectors], list(found.values)


def _filterwise(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return a Gaussian tensor whose slices along the first axis have the same norms as those of ``weight``."""
    drawn = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
    rows = drawn.flatten(1)
    rows *= weight.flatten(1).norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True)
    return drawn


def _combine(tensors: Sequence[dict[str, Tensor]], factors: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted sums by name.

    Tensors with the factor zero are left out, so that the result at a corner is that corner, bit for bit.
    """
    (first, factor), *others = [pair for pair in zip(tensors, factors, strict=True) if pair[1] != 0]
    combined = {}
    for name, tensor in first.items():
        total = tensor * factor
        for further, weight in others:
            total.add_(further[name], alpha=weight)
        combined[name] = total
    return combined


def _triangle(corners: Sequence[Weights], labels: Sequence[str]) -> tuple[float, float, float]:
    """Return the distance between the first two corners, and the third's coordinates along and across their line."""
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
    """Return the inner product over all parameters."""
    return float(sum((a[name] * b[name]).sum() for name in a))


def grid_axis(low: float, high: float, resolution: int) -> np.ndarray:
    """Return ``resolution`` evenly spaced coordinates, symmetric bit for bit where the range is symmetric."""
    steps = np.linspace(-1, 1, resolution)
    return (low + high) / 2 + (high - low) / 2 * ((steps - steps[::-1]) / 2)

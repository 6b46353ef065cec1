"""Eigenvalues, trace and spectral density of the loss's Hessian, by Hessian-vector products alone.

The matrix is never formed: n parameters would need n^2 numbers. All vectors are in the weights' precision; inner
products and the small matrices of Lanczos' method that decide the results are in fp64.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from composer_sam.diagnostics.checks import Loss, NotFiniteError, check_at_least, check_positive
from composer_sam.diagnostics.lanczos import (
    ENDS,
    Operator,
    broadened,
    dense_eigenvectors,
    extreme_eigenvectors,
    inner,
    quadrature,
    ranked,
)
from composer_sam.diagnostics.objective import Objective

__all__ = ['Eigenvalues', 'SpectralDensity', 'Trace', 'spectral_density', 'top_eigenvalues', 'trace']

# Vectors of Lanczos' method beyond the eigenvalues asked for: fewer took more products on small networks, and more
# took more memory and no fewer products.
_SPARE = 7


@dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues and unit eigenvectors, the wanted end first.

    Attributes:
        values: in units of the loss per squared weight.
        vectors: for each value one tensor per parameter; its element of the largest magnitude is positive.
        residuals: for each :math:`\\lVert H v - \\lambda v \\rVert`; an eigenvalue of H lies within it.
        products: Hessian products spent.
    """

    values: tuple[float, ...]
    vectors: tuple[list[Tensor], ...] = field(repr=False)
    residuals: tuple[float, ...]
    products: int


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace with its standard error, and the Hessian products it took."""

    value: float
    stderr: float
    products: int


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of the eigenvalues.

    Attributes:
        grid: eigenvalues, ascending and evenly spaced.
        density: at each of them; integrates to 1 over the grid, as a share of the n eigenvalues.
        sigma: width of the Gaussian every node is drawn as.
        nodes: Lanczos' nodes, before broadening, of all probes.
        weights: theirs, summing to 1.
        products: Hessian products spent.
    """

    grid: np.ndarray = field(repr=False)
    density: np.ndarray = field(repr=False)
    sigma: float
    nodes: np.ndarray = field(repr=False)
    weights: np.ndarray = field(repr=False)
    products: int


def top_eigenvalues(
    model: nn.Module | Objective,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    k: int = 1,
    *,
    which: str = 'largest',
    samples: int | None = None,
    microbatch: int | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    max_iterations: int = 1000,
    progress: bool = False,
) -> Eigenvalues:
    r"""The extreme eigenvalues of the Hessian: how strongly the loss curves at most, "the sharpness" in many tables.

    .. math:: H v_i = \lambda_i v_i, \qquad H = \nabla^2 L(w), \qquad \lambda_1 \ge \lambda_2 \ge \dots \ge \lambda_n

    by restarted Lanczos (ARPACK), started from a random vector; the values are Rayleigh quotients of the vectors it
    ends with. Eigenvalues that are exactly equal are not told apart reliably, as by any Lanczos method with one start.

    Args:
        model: the model, or an :class:`~composer_sam.diagnostics.objective.Objective`, which stands for the next two
            and for ``samples`` and ``microbatch``.
        loss: see :class:`~composer_sam.diagnostics.objective.Objective`, as ``batches``, ``samples`` and
            ``microbatch``.
        batches: the samples.
        k: how many, 1 to n.
        which: ``'largest'``, algebraically: what tables of sharpness show; ``'magnitude'``: the largest in absolute
            value; ``'smallest'``: the most negative.
        samples: at most so many samples on each rank.
        microbatch: samples per graph.
        tol: :math:`> 0`, the residual relative to the eigenvalue at which Lanczos stops. The eigenvalue's own error is
            of the order of its square.
        seed: of the starting vector.
        max_iterations: Hessian products after which to give up, about.
        progress: count the products on stderr, on the first rank.

    Cost:
        About 10 Hessian products for ``k=1`` and 20 for ``k=5`` at trained weights, where few eigenvalues stand out;
        several times that at random ones; n where that is less. 2k + 1, at least k + 7, vectors of
        n numbers on the CPU, beside a product's own memory.

    Raises:
        ValueError: an argument out of its range, or what an Objective refuses.
        NotConvergedError: Lanczos did not converge; the message says what was reached.

    Example:
        >>> import torch
        >>> from composer_sam.diagnostics import top_eigenvalues
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]   # L = (w_1^2 + 4 w_2^2) / 2
        >>> [round(value, 4) for value in top_eigenvalues(model, torch.nn.functional.mse_loss, batches, k=2).values]
        [4.0, 1.0]

    Reference:
        Lanczos' method as Lehoucq, Sorensen, Yang: ARPACK Users' Guide, SIAM 1998, https://doi.org/10.1137/1.9780898719628;
        for neural networks: Yao, Gholami, Keutzer, Mahoney: PyHessian, IEEE Big Data 2020,
        https://arxiv.org/abs/1912.07145
    """
    objective = Objective.of(model, loss, batches, samples=samples, microbatch=microbatch)
    size = _size(objective)
    check_at_least('k', k, 1)
    check_at_least('max_iterations', max_iterations, 1)
    if k > size:
        raise ValueError(f'k must be at most the number of trainable parameters, {size}, got {k}')
    if which not in ENDS:
        raise ValueError(f'which must be one of {", ".join(map(repr, ENDS))}, got {which!r}')
    check_positive('tol', tol)
    with objective.undisturbed():
        operator = _Counted(objective, progress)
        columns = min(size, max(2 * k + 1, k + _SPARE))
        if columns == size:
            vectors = dense_eigenvectors(operator, size, k, which)
        else:
            start = objective.flat(objective.gaussian(seed)).cpu().numpy()
            vectors = extreme_eigenvectors(operator, start, columns, k, which, tol, max_iterations)
        return _ritz(objective, operator, vectors, which)


def trace(
    model: nn.Module | Objective,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    *,
    estimator: str = 'hutchinson',
    probes: int = 100,
    samples: int | None = None,
    microbatch: int | None = None,
    seed: int = 0,
) -> Trace:
    r"""The trace of the Hessian, the sum of its eigenvalues: n times the mean curvature.

    .. math::

        \operatorname{tr} H \approx \frac{1}{m} \sum_{j=1}^{m} z_j^\top H z_j
        \qquad \text{or} \qquad
        \operatorname{tr} Q^\top H Q + \frac{1}{m} \sum_{j=1}^{m} \bar z_j^\top H \bar z_j,
        \quad \bar z_j = (I - Q Q^\top) z_j

    with vectors z of random signs. The first is Hutchinson's. The second, Hutch++, takes the trace on the range Q of
    H S, S random, exactly, and estimates the rest only: better where few eigenvalues dominate, as in trained networks.

    Args:
        model: the model, or an Objective.
        loss: see :class:`~composer_sam.diagnostics.objective.Objective`, as ``batches``, ``samples`` and
            ``microbatch``.
        batches: the samples.
        estimator: ``'hutchinson'`` or ``'hutch++'``.
        probes: Hessian products to spend: :math:`\ge 2` for Hutchinson, where it is m; :math:`\ge 6` for Hutch++, a
            third each for the range, the trace on it, and m.
        samples: at most so many samples on each rank.
        microbatch: samples per graph.
        seed: of the random vectors.

    Returns:
        The estimate and its standard error, the sample deviation of the m terms over :math:`\sqrt m`.

    Cost:
        ``probes`` Hessian products. Memory: Hutchinson two copies of the parameters, Hutch++ ``probes`` of them at its
        peak, on the parameters' device.

    Raises:
        ValueError: an argument out of its range, or what an Objective refuses.

    Example:
        >>> import torch
        >>> from composer_sam.diagnostics import trace
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]   # L = (w_1^2 + 4 w_2^2) / 2
        >>> found = trace(model, torch.nn.functional.mse_loss, batches, probes=10)
        >>> round(found.value, 4), round(found.stderr, 4)     # a diagonal Hessian: random signs are exact
        (5.0, 0.0)

    Reference:
        Hutchinson: A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines,
        Communications in Statistics 1990, https://doi.org/10.1080/03610919008812866; Meyer, Musco, Musco, Woodruff:
        Hutch++: Optimal Stochastic Trace Estimation, SOSA 2021, https://arxiv.org/abs/2010.09649
    """
    objective = Objective.of(model, loss, batches, samples=samples, microbatch=microbatch)
    if estimator not in ('hutchinson', 'hutch++'):
        raise ValueError(f"estimator must be 'hutchinson' or 'hutch++', got {estimator!r}")
    check_at_least('probes', probes, 2 if estimator == 'hutchinson' else 6)
    with objective.undisturbed():
        operator = _Counted(objective)
        signs = _signs(objective, seed)
        if estimator == 'hutchinson':
            value, stderr = _mean(_quadratic(operator, next(signs)) for _ in range(probes))
        else:
            value, stderr = _hutch(operator, signs, probes)
        return Trace(value, stderr, operator.products)


def spectral_density(
    model: nn.Module | Objective,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    *,
    steps: int = 40,
    probes: int = 4,
    sigma: float | None = None,
    points: int = 1024,
    samples: int | None = None,
    microbatch: int | None = None,
    seed: int = 0,
) -> SpectralDensity:
    r"""How the Hessian's n eigenvalues are distributed, by stochastic Lanczos quadrature.

    .. math::

        \phi_\sigma(t) = \frac{1}{n} \sum_{i=1}^{n} \mathcal{N}(t; \lambda_i, \sigma^2)
        \approx \frac{1}{k} \sum_{j=1}^{k} \sum_{l=1}^{m} \omega_l^{(j)} \, \mathcal{N}(t; \theta_l^{(j)}, \sigma^2)

    where :math:`\theta_l^{(j)}` are the eigenvalues of the tridiagonal matrix that m steps of Lanczos' method make from
    the j-th random direction, and :math:`\omega_l^{(j)}` the squared first elements of its eigenvectors. The density
    integrates to 1; n times it counts eigenvalues.

    Args:
        model: the model, or an Objective.
        loss: see :class:`~composer_sam.diagnostics.objective.Objective`, as ``batches``, ``samples`` and
            ``microbatch``.
        batches: the samples.
        steps: m, :math:`\ge 2`. The moments of each direction are exact up to the power 2m - 1.
        probes: k, :math:`\ge 1`, independent directions.
        sigma: :math:`> 0`, in units of the eigenvalues; None for :math:`\sqrt{10^{-5}}` of half the range of the nodes,
            as published.
        points: :math:`\ge 2`, of the grid, which reaches six sigma beyond the nodes.
        samples: at most so many samples on each rank.
        microbatch: samples per graph.
        seed: of the directions.

    Cost:
        ``steps * probes`` Hessian products; ``steps`` copies of the parameters on their device, as every Lanczos vector
        is orthogonalised against all before.

    Raises:
        ValueError: an argument out of its range, a grid too coarse for ``sigma``, or what an Objective refuses.

    Example:
        >>> import torch
        >>> from composer_sam.diagnostics import spectral_density
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]   # eigenvalues 1 and 4
        >>> found = spectral_density(model, torch.nn.functional.mse_loss, batches, steps=2, probes=1)
        >>> found.nodes.round(3).tolist(), round(float(found.density.sum() * (found.grid[1] - found.grid[0])), 3)
        ([1.0, 4.0], 1.0)

    Reference:
        Ghorbani, Krishnan, Xiao: An Investigation into Neural Net Optimization via Hessian Eigenvalue Density, ICML
        2019, https://arxiv.org/abs/1901.10159
    """
    objective = Objective.of(model, loss, batches, samples=samples, microbatch=microbatch)
    check_at_least('steps', steps, 2)
    check_at_least('probes', probes, 1)
    check_at_least('points', points, 2)
    if sigma is not None:
        check_positive('sigma', sigma)
    with objective.undisturbed():
        operator = _Counted(objective)
        rules = [quadrature(operator, objective.flat(objective.gaussian(seed + j)), steps) for j in range(probes)]
    nodes = np.concatenate([rule[0] for rule in rules])
    weights = np.concatenate([rule[1] for rule in rules]) / probes
    grid, density, width = broadened(nodes, weights, sigma, points)
    return SpectralDensity(grid, density, width, nodes, weights, operator.products)


class _Counted:
    """The Hessian as an operator on vectors of n numbers, which counts its products."""

    def __init__(self, objective: Objective, progress: bool = False):
        self.products = 0
        self._objective = objective
        self._progress = progress and objective.first_rank

    def __call__(self, vector: Tensor) -> Tensor:
        product = self._objective.flat(self._objective.hessian_product(self._objective.shaped(vector)))
        self.products += 1
        if self._progress:
            print(f'\rHessian products: {self.products}', end='', file=sys.stderr, flush=True)
        if not torch.isfinite(product).all():
            raise NotFiniteError(
                'the Hessian product is not finite: the loss, or its curvature, overflows at these weights'
            )
        return product

    def done(self) -> None:
        if self._progress:
            print(file=sys.stderr)


def _ritz(objective: Objective, operator: _Counted, vectors: np.ndarray, which: str) -> Eigenvalues:
    """Values and residuals of unit vectors, computed anew with inner products in fp64."""
    values, residuals, columns = [], [], []
    for column in np.ascontiguousarray(vectors.T):
        vector = torch.from_numpy(column).to(objective.device)
        vector = vector / inner(vector, vector) ** 0.5
        vector = vector * vector[vector.abs().argmax()].sign()
        product = operator(vector)
        values.append(inner(vector, product))
        residuals.append(float((product - values[-1] * vector).norm()))
        columns.append(objective.shaped(vector))
    order = ranked(np.array(values), which)
    operator.done()
    return Eigenvalues(
        values=tuple(values[i] for i in order),
        vectors=tuple(columns[i] for i in order),
        residuals=tuple(residuals[i] for i in order),
        products=operator.products,
    )


def _hutch(operator: Operator, signs: Iterator[Tensor], probes: int) -> tuple[float, float]:
    third = probes // 3
    sketch = torch.stack([operator(next(signs)) for _ in range(third)], dim=1)
    directions = torch.linalg.qr(sketch)[0]
    del sketch
    known = sum(_quadratic(operator, direction) for direction in directions.T.contiguous())
    if directions.shape[1] >= directions.shape[0]:
        return known, 0.0

    def beyond(vector: Tensor) -> Tensor:
        return vector - directions @ (directions.T @ vector)

    rest, stderr = _mean(_quadratic(operator, beyond(next(signs))) for _ in range(probes - 2 * third))
    return known + rest, stderr


def _quadratic(operator: Operator, vector: Tensor) -> float:
    return inner(vector, operator(vector))


def _mean(terms: Iterable[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    values = np.fromiter(terms, dtype=np.float64)
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def _signs(objective: Objective, seed: int) -> Iterator[Tensor]:
    """Vectors of independent random signs, the same on every rank."""
    generator = torch.Generator(objective.device).manual_seed(seed)
    like = objective.flat(objective.parameters)
    while True:
        yield torch.empty_like(like).bernoulli_(generator=generator).mul_(2).sub_(1)


def _size(objective: Objective) -> int:
    return sum(parameter.numel() for parameter in objective.parameters)

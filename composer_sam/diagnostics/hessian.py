"""Eigenvalues, trace and spectral density of the Hessian of the loss, from Hessian-vector products.

The matrix is never formed: for n parameters it would take n^2 numbers. Vectors are in the precision of the weights; the
inner products and small matrices that determine the results are in fp64.
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
    broadened,
    dense_eigenvectors,
    extreme_eigenvectors,
    hutch,
    inner,
    mean_and_error,
    quadratic,
    quadrature,
    ranked,
)
from composer_sam.diagnostics.objective import Objective

__all__ = ['Eigenvalues', 'SpectralDensity', 'Trace', 'spectral_density', 'top_eigenvalues', 'trace']

# The number of Lanczos vectors beyond the requested eigenvalues. On small networks fewer vectors took more products,
# and more vectors took more memory and as many products.
_SPARE = 7


@dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues and unit eigenvectors, sorted from the requested end of the spectrum.

    Attributes:
        values: the eigenvalues, in units of the loss per squared weight.
        vectors: for each value one tensor per parameter; the element of largest magnitude is positive.
        residuals: for each value :math:`\\lVert H v - \\lambda v \\rVert`; an eigenvalue of H lies within this
            distance of the value.
        products: the number of Hessian products.
    """

    values: tuple[float, ...]
    vectors: tuple[list[Tensor], ...] = field(repr=False)
    residuals: tuple[float, ...]
    products: int


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace.

    Attributes:
        value: the estimate.
        stderr: its standard error.
        products: the number of Hessian products.
    """

    value: float
    stderr: float
    products: int


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of the eigenvalues.

    Attributes:
        grid: evenly spaced points, ascending, in units of the eigenvalues.
        density: the density at each point; it integrates to 1 over the grid.
        sigma: the standard deviation of the Gaussian around every node.
        nodes: the nodes of all probes, before broadening.
        weights: the weights of the nodes; they sum to 1.
        products: the number of Hessian products.
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
    r"""Return the extreme eigenvalues of the Hessian; the largest is called "the sharpness" in many papers.

    .. math:: H v_i = \lambda_i v_i, \qquad H = \nabla^2 L(w), \qquad \lambda_1 \ge \lambda_2 \ge \dots \ge \lambda_n

    They are computed by the restarted Lanczos method (ARPACK) from a random starting vector; the values are the
    Rayleigh quotients of the final vectors. Exactly equal eigenvalues may be missed, as with every Lanczos method that
    starts from one vector.

    Args:
        model: the model, or an :class:`~composer_sam.diagnostics.objective.Objective`, which replaces ``loss``,
            ``batches``, ``samples`` and ``microbatch``.
        loss: see :class:`~composer_sam.diagnostics.objective.Objective`.
        batches: the samples.
        k: the number of eigenvalues, 1 to n.
        which: ``'largest'``: the algebraically largest, as reported for sharpness; ``'magnitude'``: the largest in
            absolute value; ``'smallest'``: the algebraically smallest.
        samples: the largest number of samples on each rank.
        microbatch: the largest number of samples in one graph.
        tol: :math:`> 0`, the residual, relative to the eigenvalue, at which Lanczos stops. The relative error of the
            eigenvalue is of the order of the square of the residual.
        seed: the seed of the starting vector.
        max_iterations: about the largest number of Hessian products.
        progress: count the products on stderr, on the first rank.

    Cost:
        About 10 Hessian products for ``k=1`` and 20 for ``k=5`` at trained weights, where few eigenvalues dominate;
        several times as many at random weights; never more than about n for small models. Memory: that of one product,
        and the larger of 2k + 1 and k + 7 vectors of n numbers on the CPU.

    Raises:
        ValueError: an argument out of its range, or what an Objective refuses.
        NotConvergedError: Lanczos did not converge; the message gives the eigenvalues that did.
        ModuleNotFoundError: SciPy is not installed; models of very few parameters do not need it.

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
    r"""Estimate the trace of the Hessian, the sum of its eigenvalues, which is n times the mean curvature.

    .. math::

        \operatorname{tr} H \approx \frac{1}{m} \sum_{j=1}^{m} z_j^\top H z_j
        \qquad \text{or} \qquad
        \operatorname{tr} Q^\top H Q + \frac{1}{m} \sum_{j=1}^{m} \bar z_j^\top H \bar z_j,
        \quad \bar z_j = (I - Q Q^\top) z_j

    with vectors z of random signs. The first is Hutchinson's estimator. The second, Hutch++, computes the trace on the
    range Q of H S, with a random S, exactly and estimates the rest. Its error is smaller where few eigenvalues
    dominate, as in trained networks.

    Args:
        model: the model, or an Objective.
        loss: see :class:`~composer_sam.diagnostics.objective.Objective`.
        batches: the samples.
        estimator: ``'hutchinson'`` or ``'hutch++'``.
        probes: the number of Hessian products: :math:`m \ge 2` for Hutchinson; :math:`\ge 6` for Hutch++, which uses
            a third each for the range, for the trace on the range, and for m.
        samples: the largest number of samples on each rank.
        microbatch: the largest number of samples in one graph.
        seed: the seed of the random vectors.

    Returns:
        The estimate and its standard error, which is the sample standard deviation of the m terms over
        :math:`\sqrt m`.

    Cost:
        ``probes`` Hessian products. Memory: two copies of the parameters for Hutchinson, at most ``probes`` copies for
        Hutch++, on the device of the parameters.

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
            value, stderr = mean_and_error(quadratic(operator, next(signs)) for _ in range(probes))
        else:
            value, stderr = hutch(operator, signs, probes)
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
    r"""Estimate the distribution of the n eigenvalues of the Hessian by stochastic Lanczos quadrature.

    .. math::

        \phi_\sigma(t) = \frac{1}{n} \sum_{i=1}^{n} \mathcal{N}(t; \lambda_i, \sigma^2)
        \approx \frac{1}{k} \sum_{j=1}^{k} \sum_{l=1}^{m} \omega_l^{(j)} \, \mathcal{N}(t; \theta_l^{(j)}, \sigma^2)

    where :math:`\theta_l^{(j)}` are the eigenvalues of the tridiagonal matrix that m Lanczos steps from the j-th random
    direction give, and :math:`\omega_l^{(j)}` are the squared first elements of its eigenvectors. The density
    integrates to 1: multiply it by n to count eigenvalues.

    Args:
        model: the model, or an Objective.
        loss: see :class:`~composer_sam.diagnostics.objective.Objective`.
        batches: the samples.
        steps: :math:`m \ge 2`. The moments of each direction are exact up to the power 2m - 1.
        probes: :math:`k \ge 1`, the number of independent directions.
        sigma: :math:`\sigma > 0`, in units of the eigenvalues; None for the published :math:`\sqrt{10^{-5}}` times half
            the range of the nodes.
        points: :math:`\ge 2`, the number of points of the grid, which extends six sigma beyond the nodes.
        samples: the largest number of samples on each rank.
        microbatch: the largest number of samples in one graph.
        seed: the seed of the directions.

    Cost:
        ``steps * probes`` Hessian products. Memory: ``steps`` copies of the parameters on their device, because every
        Lanczos vector is orthogonalised against all previous ones.

    Raises:
        ValueError: an argument out of its range, a grid too coarse for ``sigma``, or what an Objective refuses.
        ModuleNotFoundError: SciPy is not installed.

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
    """The Hessian as an operator on vectors of n numbers that counts its products."""

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
                'the Hessian product is not finite: the loss or its curvature overflows at these weights'
            )
        return product

    def done(self) -> None:
        """End the line of the count."""
        if self._progress:
            print(file=sys.stderr)


def _ritz(objective: Objective, operator: _Counted, vectors: np.ndarray, which: str) -> Eigenvalues:
    """Return the Rayleigh quotients and residuals of vectors, computed with inner products in fp64."""
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


def _signs(objective: Objective, seed: int) -> Iterator[Tensor]:
    """Yield vectors of independent random signs, the same on every rank."""
    generator = torch.Generator(objective.device).manual_seed(seed)
    like = objective.flat(objective.parameters)
    while True:
        yield torch.empty_like(like).bernoulli_(generator=generator).mul_(2).sub_(1)


def _size(objective: Objective) -> int:
    return sum(parameter.numel() for parameter in objective.parameters)

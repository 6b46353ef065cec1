"""Numerical methods on an operator: extreme eigenvectors by ARPACK, quadrature of the spectrum, and the trace.

SciPy is imported by the functions that need it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from composer_sam.diagnostics.checks import NotConvergedError
from composer_sam.extras import extra

__all__ = [
    'ENDS',
    'Operator',
    'broadened',
    'check_eigensolver',
    'dense_eigenvectors',
    'extreme_eigenvectors',
    'hutch',
    'inner',
    'mean_and_error',
    'quadratic',
    'quadrature',
    'ranked',
]

Operator = Callable[[Tensor], Tensor]
# The end of the spectrum, as ARPACK names it.
ENDS = {'largest': 'LA', 'magnitude': 'LM', 'smallest': 'SA'}
# The extra that installs the eigensolver, and the use of it.
_EIGENVALUES = ('diagnostics', 'computing eigenvalues of the Hessian')


def extreme_eigenvectors(
    operator: Operator, start: np.ndarray, columns: int, k: int, which: str, tol: float, max_iterations: int
) -> np.ndarray:
    """Return approximate eigenvectors as columns.

    Args:
        operator: the symmetric matrix.
        start: the starting vector; its type is the type of the computation.
        columns: the number of Lanczos vectors.
        k: the number of eigenvectors.
        which: the end of the spectrum, a key of ``ENDS``.
        tol: the relative residual at which to stop.
        max_iterations: about the largest number of products.

    Raises:
        NotConvergedError: fewer than k eigenvectors converged in about ``max_iterations`` products.
        ModuleNotFoundError: SciPy is not installed.
    """
    with extra(*_EIGENVALUES):
        from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh

    seen = {'largest': -np.inf, 'norm': 0.0, 'products': 0}

    def product(vector: np.ndarray) -> np.ndarray:
        v = torch.from_numpy(np.array(vector, dtype=start.dtype).reshape(-1))
        found = operator(v).cpu()
        seen['largest'] = max(seen['largest'], inner(v, found) / max(inner(v, v), np.finfo(start.dtype).tiny))
        seen['norm'] = max(seen['norm'], float(found.norm()))
        seen['products'] += 1
        return found.numpy()

    matrix = LinearOperator((len(start), len(start)), matvec=product, dtype=start.dtype)  # pyright: ignore[reportCallIssue]
    # ARPACK counts restarts. A restart keeps k vectors and computes the others again.
    restarts = max(1, (max_iterations - columns) // (columns - k) + 1)
    options: dict[str, Any] = {'k': k, 'which': ENDS[which], 'tol': tol, 'ncv': columns, 'maxiter': restarts}
    if 'rng' in inspect.signature(eigsh).parameters:
        # ARPACK draws a new vector if the Krylov space of the first one is too small; by default it draws at random.
        options['rng'] = np.random.default_rng(0)
    try:
        return eigsh(matrix, v0=start, **options)[1]
    except ArpackNoConvergence as error:
        converged = ', '.join(f'{value:.6g}' for value in sorted(error.eigenvalues, reverse=True)) or 'none'
        raise NotConvergedError(
            f'Lanczos did not converge in {seen["products"]} Hessian products: of {k} eigenvalues {converged} '
            f'reached tol={tol}, and the largest is at least {seen["largest"]:.6g}; raise max_iterations or tol'
        ) from error
    except ArpackError:
        if seen['norm']:
            raise
        # The operator maps a random vector to zero, so it is zero, and every vector is an eigenvector.
        return np.linalg.qr(np.random.default_rng(0).standard_normal((len(start), k)).astype(start.dtype))[0]


def check_eigensolver() -> None:
    """Raise ModuleNotFoundError, with the extra to install, where SciPy is not installed."""
    with extra(*_EIGENVALUES):
        import scipy.sparse.linalg  # noqa: F401


def dense_eigenvectors(operator: Operator, size: int, k: int, which: str) -> np.ndarray:
    """Return eigenvectors as columns, from the dense matrix of an operator that is no larger than Lanczos' basis."""
    identity = torch.eye(size, dtype=torch.float64)
    matrix = torch.stack([operator(row).double().cpu() for row in identity]).numpy()
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return vectors[:, ranked(values, which)[:k]]


def ranked(values: np.ndarray, which: str) -> list[int]:
    """Return the indices that sort the values from the end ``which`` of the spectrum, a key of ``ENDS``."""
    keys = {'largest': -values, 'magnitude': -np.abs(values), 'smallest': values}
    return [int(i) for i in np.argsort(keys[which], kind='stable')]


def quadrature(operator: Operator, start: Tensor, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes and weights of the Gauss quadrature of one direction, in fp64.

    Args:
        operator: the symmetric matrix.
        start: the direction.
        steps: the largest number of nodes.

    Raises:
        ModuleNotFoundError: SciPy is not installed.
    """
    with extra('diagnostics', 'the spectral density of the Hessian'):
        from scipy.linalg import eigh_tridiagonal

    steps = min(steps, len(start))
    basis = start.new_zeros(steps, len(start))
    basis[0] = start / start.norm()
    diagonal, beside = [], []
    for step in range(steps):
        vector = operator(basis[step])
        diagonal.append(inner(basis[step], vector))
        scale = float(vector.norm())
        known = basis[: step + 1]
        for _ in range(2):  # the second time removes the rounding error of the first
            vector = vector - known.T @ (known @ vector)
        length = float(vector.norm())
        # The rest is rounding error: the basis spans the Krylov space of the start.
        if step + 1 == steps or length <= 10 * torch.finfo(vector.dtype).eps * scale:
            break
        beside.append(length)
        basis[step + 1] = vector / length
    nodes, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside))
    return nodes, vectors[0] ** 2


def broadened(
    nodes: np.ndarray, weights: np.ndarray, sigma: float | None, points: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return grid, density and sigma of the sum of Gaussians around weighted nodes.

    Args:
        nodes: the centres.
        weights: the weight of each Gaussian; they sum to 1.
        sigma: the width; :math:`\\sqrt{10^{-5}}` of half the range of the nodes if None.
        points: the number of points of the grid.

    Raises:
        ValueError: the grid is too coarse for ``sigma``.
    """
    low, high = float(nodes.min()), float(nodes.max())
    if sigma is None:
        # All nodes may be equal, as for a multiple of the identity: then any width serves.
        sigma = float(1e-5**0.5 * (high - low) / 2 or 1e-3 * abs(high) or 1e-3)
    grid = np.linspace(low - 6 * sigma, high + 6 * sigma, points)
    needed = int(np.ceil((high - low) / sigma)) + 13
    if points < needed:
        raise ValueError(f'points must be >= {needed} for the grid to resolve sigma={sigma:.3g}, got {points}')
    density = np.zeros(points)
    for node, weight in zip(nodes, weights, strict=True):
        density += weight * np.exp(-0.5 * ((grid - node) / sigma) ** 2)
    return grid, density / (sigma * (2 * np.pi) ** 0.5), sigma


def inner(x: Tensor, y: Tensor) -> float:
    """Return the inner product in fp64, computed from a million elements at a time to keep the fp64 copies small."""
    return sum(float(torch.dot(a.double(), b.double())) for a, b in zip(x.split(2**20), y.split(2**20), strict=True))


def hutch(operator: Operator, signs: Iterator[Tensor], probes: int) -> tuple[float, float]:
    """Return the estimate of Hutch++ and its standard error."""
    third = probes // 3
    sketch = torch.stack([operator(next(signs)) for _ in range(third)], dim=1)
    directions = torch.linalg.qr(sketch)[0]
    del sketch
    known = sum(quadratic(operator, direction) for direction in directions.T.contiguous())
    if directions.shape[1] >= directions.shape[0]:
        return known, 0.0

    def beyond(vector: Tensor) -> Tensor:
        return vector - directions @ (directions.T @ vector)

    rest, stderr = mean_and_error(quadratic(operator, beyond(next(signs))) for _ in range(probes - 2 * third))
    return known + rest, stderr


def quadratic(operator: Operator, vector: Tensor) -> float:
    """Return the quadratic form of the operator at a vector."""
    return inner(vector, operator(vector))


def mean_and_error(terms: Iterable[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    values = np.fromiter(terms, dtype=np.float64)
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)

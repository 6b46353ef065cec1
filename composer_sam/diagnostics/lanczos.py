"""Lanczos' method on an operator: extreme eigenvectors by ARPACK, and quadrature of the spectrum."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from composer_sam.diagnostics.checks import NotConvergedError

__all__ = [
    'ENDS',
    'Operator',
    'broadened',
    'dense_eigenvectors',
    'extreme_eigenvectors',
    'inner',
    'quadrature',
    'ranked',
]

Operator = Callable[[Tensor], Tensor]
# The end of the spectrum that is wanted, in ARPACK's words.
ENDS = {'largest': 'LA', 'magnitude': 'LM', 'smallest': 'SA'}


def extreme_eigenvectors(
    operator: Operator, start: np.ndarray, columns: int, k: int, which: str, tol: float, max_iterations: int
) -> np.ndarray:
    """Approximate eigenvectors as columns.

    Raises:
        NotConvergedError: not all converged in about ``max_iterations`` products.
    """
    seen = {'largest': -np.inf, 'norm': 0.0, 'products': 0}

    def product(vector: np.ndarray) -> np.ndarray:
        v = torch.from_numpy(np.array(vector, dtype=start.dtype).reshape(-1))
        found = operator(v).cpu()
        seen['largest'] = max(seen['largest'], inner(v, found) / max(inner(v, v), np.finfo(start.dtype).tiny))
        seen['norm'] = max(seen['norm'], float(found.norm()))
        seen['products'] += 1
        return found.numpy()

    matrix = LinearOperator((len(start), len(start)), matvec=product, dtype=start.dtype)  # pyright: ignore[reportCallIssue]
    # ARPACK counts restarts, each of which makes anew all vectors but those it keeps.
    restarts = max(1, (max_iterations - columns) // (columns - k) + 1)
    options: dict[str, Any] = {'k': k, 'which': ENDS[which], 'tol': tol, 'ncv': columns, 'maxiter': restarts}
    if 'rng' in inspect.signature(eigsh).parameters:
        # Drawn from where the products of the first vector span too little; by default it would differ between runs.
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
        # The Hessian maps a random vector to zero, so it is zero, and all vectors are eigenvectors.
        return np.linalg.qr(np.random.default_rng(0).standard_normal((len(start), k)).astype(start.dtype))[0]


def dense_eigenvectors(operator: Operator, size: int, k: int, which: str) -> np.ndarray:
    """The eigenvectors of a Hessian that is no larger than Lanczos' basis would be, which is then the unit vectors."""
    identity = torch.eye(size, dtype=torch.float64)
    matrix = torch.stack([operator(row).double().cpu() for row in identity]).numpy()
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return vectors[:, ranked(values, which)[:k]]


def ranked(values: np.ndarray, which: str) -> list[int]:
    """Places of the values, the wanted end first."""
    keys = {'largest': -values, 'magnitude': -np.abs(values), 'smallest': values}
    return [int(i) for i in np.argsort(keys[which], kind='stable')]


def quadrature(operator: Operator, start: Tensor, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the Gauss quadrature that Lanczos' method makes of one direction, in fp64."""
    steps = min(steps, len(start))
    basis = start.new_zeros(steps, len(start))
    basis[0] = start / start.norm()
    diagonal, beside = [], []
    for step in range(steps):
        vector = operator(basis[step])
        diagonal.append(inner(basis[step], vector))
        scale = float(vector.norm())
        known = basis[: step + 1]
        for _ in range(2):  # once more takes away what rounding left of the first time
            vector = vector - known.T @ (known @ vector)
        length = float(vector.norm())
        # What is left is rounding: the directions so far are all that H makes of the first.
        if step + 1 == steps or length <= 10 * torch.finfo(vector.dtype).eps * scale:
            break
        beside.append(length)
        basis[step + 1] = vector / length
    nodes, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside))
    return nodes, vectors[0] ** 2


def broadened(
    nodes: np.ndarray, weights: np.ndarray, sigma: float | None, points: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Grid, density and sigma of Gaussians around weighted nodes."""
    low, high = float(nodes.min()), float(nodes.max())
    if sigma is None:
        # All nodes in one place, as of the identity: any width does.
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
    """The inner product in fp64, a million elements at a time: fp64 copies of all would outweigh the vectors."""
    return sum(float(torch.dot(a.double(), b.double())) for a, b in zip(x.split(2**20), y.split(2**20), strict=True))

"""Losses whose every derivative is known: a quadratic, and small networks with their exact Hessian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

__all__ = ['Quadratic', 'ball_maximum', 'batches', 'classifier', 'dense_hessian', 'flat', 'mean_output']


class Quadratic(nn.Module):
    """L(w) = w A w / 2 + b w for every sample; w is spread over a matrix called weight and a vector called bias."""

    matrix: Tensor
    vector: Tensor

    def __init__(self, matrix: Tensor, vector: Tensor, at: Tensor):
        super().__init__()
        self.register_buffer('matrix', matrix)
        self.register_buffer('vector', vector)
        half = len(at) // 2
        self.weight = nn.Parameter(at[:half].clone().reshape(1, half))
        self.bias = nn.Parameter(at[half:].clone())

    def forward(self, x: Tensor) -> Tensor:
        w = torch.cat([self.weight.reshape(-1), self.bias])
        return (w @ self.matrix @ w / 2 + self.vector @ w).expand(len(x))

    @classmethod
    def with_eigenvalues(cls, eigenvalues: Sequence[float], seed: int = 0, gradient: float = 1.0) -> Quadratic:
        """A random rotation of the eigenvalues, random weights, and a gradient of about the size ``gradient``."""
        generator = torch.Generator().manual_seed(seed)
        size = len(eigenvalues)
        rotation = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
        matrix = rotation @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ rotation.T
        at = torch.randn(size, dtype=torch.float64, generator=generator)
        wanted = gradient * torch.randn(size, dtype=torch.float64, generator=generator)
        return cls((matrix + matrix.T) / 2, wanted - matrix @ at, at)

    def data(self) -> list[tuple[Tensor, Tensor]]:
        return [(torch.zeros(3, 1, dtype=self.vector.dtype), torch.zeros(3))]

    def gradient(self) -> Tensor:
        return self.matrix @ flat([self.weight, self.bias]) + self.vector


def mean_output(outputs: Tensor, targets: Tensor) -> Tensor:
    del targets
    return outputs.mean()


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def ball_maximum(matrix: Tensor, gradient: Tensor, rho: float) -> float:
    """max g e + e H e / 2 over |e| <= rho: e = (mu - H)^-1 g with the mu >= 0, max eigenvalue, that gives |e| = rho;
    or with mu = 0 where that lies inside the ball and H is negative definite."""
    values, vectors = np.linalg.eigh(matrix.numpy())
    g = vectors.T @ gradient.numpy()

    def at(mu: float) -> np.ndarray:
        return g / (mu - values)

    low = max(0.0, values[-1])
    if low > values[-1] and np.linalg.norm(at(0.0)) <= rho:
        e = at(0.0)
    else:
        high = low + np.linalg.norm(g) / rho + 1.0
        root: Any = brentq(
            lambda mu: np.linalg.norm(at(mu)) - rho, low + 1e-12, high, xtol=1e-15, rtol=np.float64(1e-14)
        )
        e = at(root)
    return float(g @ e + (values * e * e).sum() / 2)


def classifier(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """Linear, BatchNorm with statistics away from 0 and 1, dropout: 80 parameters; one of them is frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norm = nn.BatchNorm1d(5)
        model = nn.Sequential(nn.Linear(6, 5), norm, nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4), nn.Linear(4, 4))
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.8)
    model[5].weight.requires_grad_(False)
    return model.to(dtype)


def batches(dtype: torch.dtype = torch.float64, sizes: Sequence[int] = (7, 4, 9), seed: int = 1) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 6, generator=generator).to(dtype), torch.randint(4, (size,), generator=generator))
        for size in sizes
    ]


def dense_hessian(model: nn.Module, data: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The Hessian of the mean cross entropy over all samples at once, by torch.func, independent of batches."""
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    was = model.training
    model.eval()

    def loss(w: Tensor) -> Tensor:
        parts = w.split([p.numel() for p in trainable.values()])
        given = {name: part.view_as(p) for part, (name, p) in zip(parts, trainable.items(), strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, given, (x,)), y)

    matrix = torch.autograd.functional.hessian(loss, flat(list(trainable.values())))
    model.train(was)
    assert isinstance(matrix, Tensor)
    return matrix

"""Every method as its paper writes it: on one flat fp64 vector of weights, naively, with nothing of the engine.

A specification takes ``gradient`` (flat weights -> flat gradient of the batch, differentiable), the weights ``w``, the
parameters' names and shapes, the number of the step and the method's hyper-parameters. It returns the direction for
the base optimizer, or a pair: the direction and what is subtracted beside it, times lr.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Gradient = Callable[[Tensor], Tensor]
Pieces = list[tuple[str, torch.Size]]


def cut(x: Tensor, pieces: Pieces) -> list[Tensor]:
    """One flat vector as the parameters' tensors."""
    return [part.view(shape) for part, (_, shape) in zip(x.split([s.numel() for _, s in pieces]), pieces, strict=True)]


def glue(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def ascent(g: Tensor, rho: float, epsilon: float, t: Tensor | float = 1.0) -> Tensor:
    return rho * t**2 * g / ((t * g).norm() + epsilon)


def sam(gradient: Gradient, w: Tensor, pieces: Pieces, number: int, rho=0.05, epsilon=1e-12, adaptive=False) -> Tensor:
    g = gradient(w)
    return gradient(w + ascent(g, rho, epsilon, w.abs() if adaptive else 1.0))


def asam(gradient: Gradient, w: Tensor, pieces: Pieces, number: int, rho=0.5, eta=0.01, epsilon=1e-16) -> Tensor:
    parts = [
        part.abs() + eta if 'weight' in name else torch.ones_like(part)
        for part, (name, _) in zip(cut(w, pieces), pieces, strict=True)
    ]
    return gradient(w + ascent(gradient(w), rho, epsilon, glue(parts)))


def wsam(
    gradient: Gradient,
    w: Tensor,
    pieces: Pieces,
    number: int,
    rho=0.05,
    gamma=0.9,
    epsilon=1e-12,
    adaptive=False,
    decouple=True,
    max_norm=None,
) -> Tensor | tuple[Tensor, Tensor]:
    def clipped(x: Tensor) -> Tensor:
        return x if max_norm is None else x * min(1.0, max_norm / (x.norm().item() + 1e-6))

    alpha = gamma / (1 - gamma)
    g = gradient(w)
    ascended = clipped(gradient(w + ascent(g, rho, epsilon, w.abs() if adaptive else 1.0)))
    g = clipped(g)
    return (g, alpha * (ascended - g)) if decouple else (1 - alpha) * g + alpha * ascended


def gam(
    gradient: Gradient,
    w: Tensor,
    pieces: Pieces,
    number: int,
    grad_rho=0.02,
    grad_norm_rho=0.2,
    grad_beta_1=0.5,
    grad_beta_2=0.5,
    grad_beta_3=0.5,
    grad_gamma=0.03,
    epsilon=1e-12,
    adaptive=False,
) -> Tensor:
    def t(at: Tensor) -> Tensor | float:
        return at.abs() if adaptive else 1.0

    g0 = gradient(w)
    e0 = ascent(g0, grad_rho, epsilon, t(w))
    g1 = gradient(w + e0)
    e1 = ascent(g1 - g0, grad_norm_rho, epsilon, t(w))
    g2 = gradient(w + e1)
    e2 = ascent(g2, grad_rho, epsilon, t(w + e1))
    g3 = gradient(w + e1 + e2)
    p = g0 + abs(grad_beta_2) * g2
    q = grad_beta_1 * g1 + grad_beta_3 * g3
    cosine = (p @ q) / (p.norm() * q.norm() + epsilon)
    return q - grad_gamma * (p - cosine * p.norm() * q / (q.norm() + epsilon))


def sam_direction(
    gradient: Gradient,
    w: Tensor,
    pieces: Pieces,
    number: int,
    rho=0.05,
    granularity='global',
    adaptive=False,
    epsilon=1e-12,
) -> Tensor:
    g = gradient(w)
    ascended = gradient(w + ascent(g, rho, epsilon, w.abs() if adaptive else 1.0))
    if granularity == 'elementwise':
        return ascended.sign() * g.abs()
    if granularity == 'global':
        return ascended * g.norm() / ascended.norm()
    pairs = zip(cut(g, pieces), cut(ascended, pieces), strict=True)
    return glue([a * b.norm() / a.norm() for b, a in pairs])


def sam_magnitude(
    gradient: Gradient,
    w: Tensor,
    pieces: Pieces,
    number: int,
    rho=0.05,
    granularity='global',
    adaptive=False,
    epsilon=1e-12,
) -> Tensor:
    g = gradient(w)
    ascended = gradient(w + ascent(g, rho, epsilon, w.abs() if adaptive else 1.0))
    if granularity == 'elementwise':
        return g.sign() * ascended.abs()
    if granularity == 'global':
        return g * ascended.norm() / g.norm()
    pairs = zip(cut(g, pieces), cut(ascended, pieces), strict=True)
    return glue([b * a.norm() / b.norm() for b, a in pairs])


class SGDHess:
    """With a dense Hessian; keeps h between the steps that compute it."""

    def __init__(self) -> None:
        self.h: Tensor | None = None

    def __call__(
        self, gradient: Gradient, w: Tensor, pieces: Pieces, number: int, rho=0.05, interval_hessian=1
    ) -> Tensor:
        if self.h is None or number % interval_hessian == 0:
            random = torch.Generator().manual_seed(number)
            v = glue([2 * torch.empty(s, dtype=w.dtype).bernoulli_(generator=random) - 1 for _, s in pieces])
            hessian = torch.autograd.functional.jacobian(gradient, w)
            h = (hessian @ v).abs()
            self.h = glue(
                [part.mean(tuple(range(2, part.dim())), keepdim=True).expand_as(part) if 3 <= part.dim() <= 5 else part
                 for part in cut(h, pieces)]
            )  # fmt: skip
        g = gradient(w)
        return g + rho * self.h * g


# One fresh specification per trajectory.
SPECIFICATIONS: dict[str, Callable[[], Callable]] = {
    'SAM': lambda: sam,
    'ASAM': lambda: asam,
    'WSAM': lambda: wsam,
    'GAM': lambda: gam,
    'SAMDirection': lambda: sam_direction,
    'SAMMagnitude': lambda: sam_magnitude,
    'SGDHess': SGDHess,
}


class SGD:
    """lr 0.05, momentum 0.9, weight decay 1e-2, as in problems.BASES."""

    lr = 0.05
    buffer: Tensor | None = None

    def step(self, w: Tensor, direction: Tensor) -> Tensor:
        d = direction + 1e-2 * w
        self.buffer = d if self.buffer is None else 0.9 * self.buffer + d
        return w - 0.05 * self.buffer


class AdamW:
    """lr 0.01, betas 0.9 and 0.999, eps 1e-8, weight decay 1e-1, as in problems.BASES."""

    lr = 0.01
    t = 0

    def step(self, w: Tensor, direction: Tensor) -> Tensor:
        if self.t == 0:
            self.m, self.v = torch.zeros_like(w), torch.zeros_like(w)
        self.t += 1
        w = w - 0.01 * 1e-1 * w
        self.m = 0.9 * self.m + 0.1 * direction
        self.v = 0.999 * self.v + 0.001 * direction**2
        return w - 0.01 * (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)


BASES = {'SGD': SGD, 'AdamW': AdamW}


def follow(name: str, values: dict, base, gradients: list[Gradient], w: Tensor, pieces: Pieces) -> Tensor:
    """The weights after one step per gradient function."""
    specification = SPECIFICATIONS[name]()
    for number, gradient in enumerate(gradients):
        found = specification(gradient, w, pieces, number, **values)
        direction, decoupled = found if isinstance(found, tuple) else (found, torch.zeros_like(w))
        w = (base.step(w, direction) - base.lr * decoupled).detach()
    return w

"""The growth of the loss, and of its gradient, within a ball around the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from composer_sam.diagnostics.ascent import Maximum, check_ascent, check_eta, maximise
from composer_sam.diagnostics.checks import Loss, NotFiniteError, check_at_least, check_count, check_positive
from composer_sam.diagnostics.objective import Objective
from composer_sam.vectors import Vector, norm, scale

__all__ = [
    'AverageSharpness',
    'Flatness',
    'Sharpness',
    'adaptive_sharpness',
    'average_sharpness',
    'first_order_flatness',
    'sam_sharpness',
]


@dataclass(frozen=True)
class Sharpness:
    """The growth of the loss within a ball.

    Attributes:
        value: the largest growth found; with ``ascent='first_order'`` the same as ``first_order``.
        first_order: the growth at the first-order solution, where a linear expansion of the loss is largest.
        loss: L(w).
        rho: the radius.
    """

    value: float
    first_order: float
    loss: float
    rho: float


@dataclass(frozen=True)
class AverageSharpness:
    """The mean growth of the loss under random offsets.

    Attributes:
        value: the mean.
        stderr: its standard error.
        loss: L(w).
        rho: the root mean square length of the offsets.
    """

    value: float
    stderr: float
    loss: float
    rho: float


@dataclass(frozen=True)
class Flatness:
    """First-order flatness.

    Attributes:
        value: rho times the largest gradient norm found; with ``ascent='first_order'`` the same as ``first_order``.
        first_order: rho times the gradient norm at the first-order solution.
        gradient_norm: the gradient norm at w.
        rho: the radius.
    """

    value: float
    first_order: float
    gradient_norm: float
    rho: float


def sam_sharpness(
    model: nn.Module | Objective,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    rho: float = 0.05,
    *,
    ascent: str = 'projected',
    steps: int = 20,
    m: int | None = None,
    samples: int | None = None,
    microbatch: int | None = None,
    seed: int = 0,
) -> Sharpness:
    r"""Return the largest growth of the loss within a radius, which SAM minimises besides the loss.

    .. math:: S_\rho(w) = \max_{\lVert e \rVert_2 \le \rho} L(w + e) - L(w)

    ``'first_order'`` evaluates :math:`e = \rho \, g / \lVert g \rVert`, as SAM does; the result can be negative.
    ``'projected'`` continues from there by projected gradient ascent and keeps the largest value, so the result is
    never smaller, and never negative. The loss is not concave in e, so the result is a lower bound of the maximum.

    Args:
        model: the model, or an :class:`~composer_sam.diagnostics.objective.Objective`, which replaces ``loss``,
            ``batches``, ``samples`` and ``microbatch``.
        loss: see :class:`~composer_sam.diagnostics.objective.Objective`.
        batches: the samples.
        rho: :math:`\rho > 0`, in units of the weights.
        ascent: ``'projected'`` or ``'first_order'``.
        steps: :math:`\ge 0`, the number of evaluations of projected ascent.
        m: :math:`\ge 1` for m-sharpness, the mean of the sharpness over groups of m samples, in their order; each rank
            groups its own samples. None for all samples together.
        samples: the largest number of samples on each rank.
        microbatch: the largest number of samples in one graph.
        seed: the seed of the start of projected ascent where the gradient is zero.

    Cost:
        2 passes for ``'first_order'``, ``steps`` + 2 for ``'projected'``. Memory: that of a pass, and about six copies
        of the parameters.

    Raises:
        ValueError: an argument out of its range, a loss that is not finite, or what an Objective refuses.

    Example:
        >>> import torch
        >>> from composer_sam.diagnostics import sam_sharpness
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> batches = [(torch.ones(2, 1), torch.ones(2, 1))]                    # L = (w - 1)^2
        >>> round(sam_sharpness(model, torch.nn.functional.mse_loss, batches, rho=0.5).value, 4)   # 2.5^2 - 2^2
        2.25

    Reference:
        Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving Generalization, ICLR
        2021, https://arxiv.org/abs/2010.01412
    """
    objective = Objective.of(model, loss, batches, samples=samples, microbatch=microbatch)
    return _loss_growth(objective, rho, ascent, steps, m, seed, lambda _: None)


def adaptive_sharpness(
    model: nn.Module | Objective,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    rho: float = 0.5,
    *,
    eta: float = 0.01,
    ascent: str = 'projected',
    steps: int = 20,
    m: int | None = None,
    samples: int | None = None,
    microbatch: int | None = None,
    seed: int = 0,
) -> Sharpness:
    r"""Return the sharpness with offsets in units of each weight, which ASAM minimises besides the loss.

    .. math::

        S_\rho(w) = \max_{\lVert T_w^{-1} e \rVert_2 \le \rho} L(w + e) - L(w), \qquad
        T_w = |w| + \eta \text{ for parameters with weight in their name}, \; 1 \text{ for the others}

    elementwise, as in :class:`composer_sam.ASAM`. With ``eta=0``, in a network of ReLUs without biases, the result does
    not change if the weights of one layer are multiplied by a factor and those of the next layer divided by it. The
    first-order solution is :math:`e = \rho \, T_w^2 g / \lVert T_w g \rVert`.

    Args:
        model: the model, or an Objective.
        loss: see :class:`~composer_sam.diagnostics.objective.Objective`.
        batches: the samples.
        rho: :math:`\rho > 0`, relative to the weights.
        eta: :math:`\eta \ge 0`, in units of the weights.
        ascent: ``'projected'`` or ``'first_order'``, as for :func:`sam_sharpness`.
        steps: :math:`\ge 0`, the number of evaluations of projected ascent.
        m: :math:`\ge 1` for m-sharpness, as for :func:`sam_sharpness`; None for all samples together.
        samples: the largest number of samples on each rank.
        microbatch: the largest number of samples in one graph.
        seed: the seed of the start of projected ascent where the gradient is zero.

    Cost:
        That of :func:`sam_sharpness`, and one more copy of the parameters.

    Raises:
        ValueError: an argument out of its range, a loss that is not finite, or what an Objective refuses.

    Example:
        >>> import torch
        >>> from composer_sam.diagnostics import adaptive_sharpness
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> batches = [(torch.ones(2, 1), torch.ones(2, 1))]                    # L = (w - 1)^2, |e| <= 3 rho
        >>> round(adaptive_sharpness(model, torch.nn.functional.mse_loss, batches, rho=0.5, eta=0.0).value, 4)
        8.25

    Reference:
        Kwon, Kim, Park, Choi: ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
        Networks, ICML 2021, https://arxiv.org/abs/2102.11600
    """
    check_eta(eta)
    objective = Objective.of(model, loss, batches, samples=samples, microbatch=microbatch)

    def metric(part: Objective) -> Vector:
        pairs = zip(part.names, part.parameters, strict=True)
        return part.vector([p.detach().abs() + eta if 'weight' in name else torch.ones_like(p) for name, p in pairs])

    return _loss_growth(objective, rho, ascent, steps, m, seed, metric)


def average_sharpness(
    model: nn.Module | Objective,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    rho: float = 0.05,
    *,
    draws: int = 20,
    samples: int | None = None,
    microbatch: int | None = None,
    seed: int = 0,
) -> AverageSharpness:
    r"""Estimate the mean growth of the loss under random offsets.

    .. math:: \mathbb{E}_{e} \, L(w + e) - L(w), \qquad e \sim \mathcal{N}(0, \tfrac{\rho^2}{n} I),
        \qquad \mathbb{E} \lVert e \rVert^2 = \rho^2

    for n weights, which to second order is :math:`\tfrac{\rho^2}{2n} \operatorname{tr} H`. Offsets are used in pairs e
    and -e, which cancels the contribution of the gradient.

    Args:
        model: the model, or an Objective.
        loss: see :class:`~composer_sam.diagnostics.objective.Objective`.
        batches: the samples.
        rho: :math:`\rho > 0`, the root mean square length of the offsets, in units of the weights.
        draws: :math:`\ge 2`, the number of pairs.
        samples: the largest number of samples on each rank.
        microbatch: the largest number of samples in one graph.
        seed: the seed of the offsets.

    Cost:
        2 ``draws`` + 1 forwards. Memory: that of a forward, and three copies of the parameters.

    Raises:
        ValueError: an argument out of its range, a loss that is not finite, or what an Objective refuses.

    Example:
        >>> import torch
        >>> from composer_sam.diagnostics import average_sharpness
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> batches = [(torch.ones(2, 1), torch.ones(2, 1))]                    # L = (w - 1)^2, so E e^2 = rho^2
        >>> found = average_sharpness(model, torch.nn.functional.mse_loss, batches, rho=0.5, draws=100)
        >>> abs(found.value - 0.25) < 3 * found.stderr
        True

    Reference:
        Neyshabur, Bhojanapalli, McAllester, Srebro: Exploring Generalization in Deep Learning, NeurIPS 2017,
        https://arxiv.org/abs/1706.08947
    """
    check_positive('rho', rho)
    check_at_least('draws', draws, 2)
    objective = Objective.of(model, loss, batches, samples=samples, microbatch=microbatch)
    size = sum(parameter.numel() for parameter in objective.parameters)
    with objective.undisturbed():
        centre = _finite(objective.value(), 'at the weights')
        growths = []
        for draw in range(draws):
            offset = scale(objective.vector(objective.gaussian(seed + draw)), rho / size**0.5)
            there = [_value_at(objective, values) for values in (offset.values, scale(offset, -1.0).values)]
            growths.append(
                _finite(sum(there) / 2, f'at a random offset for rho={rho}; a smaller rho may help') - centre
            )
    found = torch.tensor(growths, dtype=torch.float64)
    return AverageSharpness(found.mean().item(), (found.std() / draws**0.5).item(), centre, rho)


def first_order_flatness(
    model: nn.Module | Objective,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    rho: float = 0.2,
    *,
    ascent: str = 'projected',
    steps: int = 20,
    samples: int | None = None,
    microbatch: int | None = None,
    seed: int = 0,
) -> Flatness:
    r"""Return the largest gradient norm within a radius, times the radius, which GAM minimises besides the loss.

    .. math:: R_\rho^{(1)}(w) = \rho \max_{\lVert e \rVert_2 \le \rho} \lVert \nabla L(w + e) \rVert_2

    The factor :math:`\rho` is part of the definition. The result is an upper bound of :math:`S_\rho(w)` of
    :func:`sam_sharpness`; at a minimum it is, to second order, :math:`\rho^2` times the largest absolute eigenvalue of
    the Hessian. The ascent maximises the gradient norm, whose gradient is :math:`H g / \lVert g \rVert`. Its
    first-order solution is :math:`e = \rho \, H g / \lVert H g \rVert`, which GAM approximates by a difference of
    gradients.

    Args:
        model: the model, or an Objective.
        loss: see :class:`~composer_sam.diagnostics.objective.Objective`.
        batches: the samples.
        rho: :math:`\rho > 0`, in units of the weights.
        ascent: ``'projected'`` or ``'first_order'``, as for :func:`sam_sharpness`.
        steps: :math:`\ge 0`, the number of evaluations of projected ascent.
        samples: the largest number of samples on each rank.
        microbatch: the largest number of samples in one graph.
        seed: the seed of the start where the gradient, or its product with the Hessian, is zero.

    Cost:
        A pass and a Hessian product at each of 2 (``'first_order'``) or ``steps`` + 2 points.

    Raises:
        ValueError: an argument out of its range, a gradient that is not finite, or what an Objective refuses.

    Example:
        >>> import torch
        >>> from composer_sam.diagnostics import first_order_flatness
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> batches = [(torch.ones(2, 1), torch.ones(2, 1))]                    # L = (w - 1)^2, gradient 2 (w - 1)
        >>> round(first_order_flatness(model, torch.nn.functional.mse_loss, batches, rho=0.5).value, 4)
        2.5

    Reference:
        Zhang, Xu, Yu, Zou, Cui: Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves
        Generalization, CVPR 2023, https://arxiv.org/abs/2303.03108
    """
    check_ascent(rho, ascent, steps)
    objective = Objective.of(model, loss, batches, samples=samples, microbatch=microbatch)

    def gradient_norm(offset: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        with objective.at(offset):
            loss, values = objective.value_and_gradient()
            gradient = objective.vector(values)
            length = float(norm(gradient)) if math.isfinite(loss) else loss
            if not length or not math.isfinite(length):
                return length, objective.zeros()  # the norm is not differentiable here
            return length, objective.hessian_product(scale(gradient, 1 / length).values)

    with objective.undisturbed():
        found = maximise(objective, gradient_norm, rho, steps=steps if ascent == 'projected' else 0, seed=seed)
    value = found.value if ascent == 'projected' else found.first_order
    return Flatness(rho * value, rho * found.first_order, found.centre, rho)


def _loss_growth(
    objective: Objective,
    rho: float,
    ascent: str,
    steps: int,
    m: int | None,
    seed: int,
    metric: Callable[[Objective], Vector | None],
) -> Sharpness:
    check_ascent(rho, ascent, steps)
    check_count('m', m)
    projected = ascent == 'projected'
    with objective.undisturbed():
        if m is None:
            found = _maximal_loss(objective, rho, metric(objective), steps if projected else 0, seed)
            centre, first_order, value = found.centre, found.first_order, found.value
        else:
            sums = [0.0, 0.0, 0.0]
            for part in objective.subsets(m):
                found = _maximal_loss(part, rho, metric(part), steps if projected else 0, seed)
                for place, level in enumerate((found.centre, found.first_order, found.value)):
                    sums[place] += level * part.samples / objective.samples
            centre, first_order, value = (objective.over_ranks(total) for total in sums)
    return Sharpness((value if projected else first_order) - centre, first_order - centre, centre, rho)


def _maximal_loss(objective: Objective, rho: float, metric: Vector | None, steps: int, seed: int) -> Maximum:
    def value_and_gradient(offset: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        with objective.at(offset):
            return objective.value_and_gradient()

    return maximise(objective, value_and_gradient, rho, metric=metric, steps=steps, seed=seed)


def _value_at(objective: Objective, offset: Sequence[Tensor]) -> float:
    with objective.at(offset):
        return objective.value()


def _finite(number: float, where: str) -> float:
    if not math.isfinite(number):
        raise NotFiniteError(f'the loss is {number} {where}')
    return number

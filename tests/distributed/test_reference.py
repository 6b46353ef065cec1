"""Two ranks beside one process that computes the published rule from both ranks' batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problem import STEPS, Network, batches, counted_reductions, flat, train
from ranks import two_ranks
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from composer_sam import SGDHess, registry
from tests.reference import specifications

Gradient = Callable[[Tensor], Tensor]


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


def averaged(name: str) -> Callable:
    """SAM, ASAM, GAM: every rank follows the rule by itself, and the directions are averaged."""

    def follow(gradients: list[Gradient], w: Tensor, pieces: Any, number: int, **values: Any) -> Tensor:
        rule = specifications.SPECIFICATIONS[name]()
        return mean([rule(gradient, w, pieces, number, **values) for gradient in gradients])

    return follow


def wsam(gradients, w, pieces, number, rho, gamma, max_norm):
    def clipped(x: Tensor) -> Tensor:
        return x * min(1.0, max_norm / (x.norm().item() + 1e-6))

    g = [gradient(w) for gradient in gradients]
    ascended = [gradient(w + rho * own / (own.norm() + 1e-12)) for gradient, own in zip(gradients, g, strict=True)]
    total, sharp = clipped(mean(g)), clipped(mean(ascended))
    return total, gamma / (1 - gamma) * (sharp - total)


def half_of_sam(which: str) -> Callable:
    def follow(gradients, w, pieces, number, rho):
        g = [gradient(w) for gradient in gradients]
        ascended = [gradient(w + rho * own / (own.norm() + 1e-12)) for gradient, own in zip(gradients, g, strict=True)]
        plain, sharp = mean(g), mean(ascended)
        return sharp * plain.norm() / sharp.norm() if which == 'direction' else plain * sharp.norm() / plain.norm()

    return follow


def sgd_hess(gradients, w, pieces, number, rho):
    random = torch.Generator().manual_seed(number)
    v = torch.cat([(2 * torch.empty(s, dtype=w.dtype).bernoulli_(generator=random) - 1).reshape(-1) for _, s in pieces])
    curvature = mean([torch.autograd.functional.jacobian(gradient, w) @ v for gradient in gradients]).abs()
    g = mean([gradient(w) for gradient in gradients])
    return g + rho * curvature * g


RULES: dict[str, tuple[Callable, dict[str, Any]]] = {
    'SAM': (averaged('SAM'), {'rho': 0.3}),
    'ASAM': (averaged('ASAM'), {'rho': 0.8}),
    'GAM': (averaged('GAM'), {'grad_rho': 0.2, 'grad_norm_rho': 0.3, 'grad_gamma': 0.2}),
    'WSAM': (wsam, {'rho': 0.3, 'gamma': 0.7, 'max_norm': 0.8}),
    'SAMDirection': (half_of_sam('direction'), {'rho': 0.3}),
    'SAMMagnitude': (half_of_sam('magnitude'), {'rho': 0.3}),
    'SGDHess': (sgd_hess, {'rho': 0.5}),
}
COLLECTIVES = {'SAM': 1, 'ASAM': 1, 'WSAM': 2, 'GAM': 1, 'SAMDirection': 2, 'SAMMagnitude': 2, 'SGDHess': 2}


def test_every_method_has_a_rule_for_several_ranks() -> None:
    assert set(RULES) == set(COLLECTIVES) == set(registry)


@two_ranks
@pytest.mark.parametrize('name', sorted(RULES))
def test_two_ranks_follow_the_published_rule(name: str) -> None:
    rule, values = RULES[name]
    network = Network()
    pieces = [(n, p.shape) for n, p in network.named_parameters()]

    def gradient_of(batch: tuple[Tensor, Tensor]) -> Gradient:
        def gradient(w: Tensor) -> Tensor:
            w = w if w.requires_grad else w.clone().requires_grad_()
            parts = {n: part for (n, _), part in zip(pieces, specifications.cut(w, pieces), strict=True)}
            loss = nn.functional.mse_loss(functional_call(network, parts, (batch[0],)), batch[1])
            return torch.autograd.grad(loss, w, create_graph=True)[0]

        return gradient

    reference, w = specifications.SGD(), flat(network)
    reference.lr = 0.05
    of_ranks = [batches(rank) for rank in range(dist.get_world_size())]
    for step in range(STEPS):
        found = rule([gradient_of(data[step]) for data in of_ranks], w, pieces, step, **values)
        direction, decoupled = found if isinstance(found, tuple) else (found, torch.zeros_like(w))
        w = (reference.step(w, direction.detach()) - reference.lr * decoupled).detach()

    model = DistributedDataParallel(Network())
    train(model, registry[name](**values), batches(dist.get_rank()), lr=0.05, momentum=0.9, weight_decay=1e-2)
    assert (flat(model) - flat(Network())).norm() > 0.1
    assert_close(flat(model), w, rtol=1e-10, atol=1e-12)


@two_ranks
@pytest.mark.parametrize('values', [{'interval': 3}, {'interval_hessian': 3}, {'start': '2ba', 'end': '5ba'}])
def test_a_differentiable_backward_is_averaged_on_the_steps_in_between(values: dict[str, Any]) -> None:
    """DistributedDataParallel cannot average a gradient that has a graph; equal data must then equal one process."""
    model, one = DistributedDataParallel(Network()), Network()
    train(model, SGDHess(rho=0.5, **values), batches(0))
    train(one, SGDHess(rho=0.5, **values), batches(0))
    assert_close(flat(model), flat(one), rtol=1e-10, atol=1e-12)
    apart = DistributedDataParallel(Network())
    train(apart, SGDHess(rho=0.5, **values), batches(dist.get_rank()))
    weights = [torch.empty_like(flat(apart)) for _ in range(dist.get_world_size())]
    dist.all_gather(weights, flat(apart))
    assert torch.equal(*weights)


@two_ranks
@pytest.mark.parametrize('name', sorted(COLLECTIVES))
def test_a_step_takes_as_many_collectives_as_its_rule_needs(name: str) -> None:
    model = DistributedDataParallel(Network())
    with counted_reductions(model) as taken:
        train(model, registry[name](), batches(dist.get_rank(), 10))
    assert len(taken) == 10 * COLLECTIVES[name], taken[:4]

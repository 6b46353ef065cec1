"""The engine's trajectory beside the specification's, fp64, 25 steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from composer_sam import SharpnessAwareOptimizer, registry
from tests.problems import BASES, Closure, batches, convolutional, needs_graph
from tests.reference import specifications

# Besides the defaults, every hyper-parameter away from its default, so that none can be ignored unnoticed.
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ('SAM', {}),
    ('SAM', {'rho': 0.7, 'epsilon': 0.3}),
    ('SAM', {'rho': 0.7, 'adaptive': True}),
    ('ASAM', {}),
    ('ASAM', {'rho': 1.5, 'eta': 0.3, 'epsilon': 0.1}),
    ('WSAM', {'gamma': 0.6}),
    ('WSAM', {'rho': 0.3, 'gamma': 0.8, 'epsilon': 0.2, 'adaptive': True, 'max_norm': 0.5}),
    ('WSAM', {'rho': 0.3, 'gamma': 0.8, 'decouple': False}),
    ('WSAM', {'rho': 0.3, 'gamma': 0.7, 'decouple': False, 'max_norm': 0.4}),
    ('GAM', {}),
    ('GAM', {'grad_rho': 0.3, 'grad_norm_rho': 0.4, 'grad_beta_1': 0.6, 'grad_beta_2': -0.7, 'grad_beta_3': 0.4,
             'grad_gamma': 0.3, 'epsilon': 0.05}),
    ('GAM', {'grad_rho': 0.3, 'grad_norm_rho': 0.2, 'adaptive': True, 'grad_gamma': 0.1}),
    *[(name, {'rho': 0.4, 'granularity': granularity, 'epsilon': 0.1})
      for name in ('SAMDirection', 'SAMMagnitude') for granularity in ('global', 'tensor', 'elementwise')],
    *[(name, {'rho': 0.4, 'adaptive': True}) for name in ('SAMDirection', 'SAMMagnitude')],
    ('SGDHess', {}),
    ('SGDHess', {'rho': 1.5, 'interval_hessian': 4}),
]  # fmt: skip


def test_every_method_and_hyperparameter_has_a_specification() -> None:
    import dataclasses

    from composer_sam.methods.base import SharpnessAware

    assert set(specifications.SPECIFICATIONS) == set(registry)
    shared = {field.name for field in dataclasses.fields(SharpnessAware)}
    for name, method in registry.items():
        varied = {key for other, values in SETTINGS for key in values if other == name}
        assert varied == {field.name for field in dataclasses.fields(method)} - shared, name


@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize(('name', 'values'), SETTINGS, ids=lambda value: str(value) if isinstance(value, str) else '-')
def test_trajectory_equals_specification(name: str, values: dict[str, Any], base: str) -> None:
    model = convolutional()
    parameters = dict(model.named_parameters())
    pieces = [(n, p.shape) for n, p in parameters.items()]
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    def gradient_of(batch: tuple[Tensor, Tensor]) -> specifications.Gradient:
        def loss(flat: Tensor) -> Tensor:
            values = {n: part for (n, _), part in zip(pieces, specifications.cut(flat, pieces), strict=True)}
            return nn.functional.cross_entropy(functional_call(model, values, (batch[0],)), batch[1])

        def gradient(flat: Tensor) -> Tensor:
            flat = flat if flat.requires_grad else flat.clone().requires_grad_()
            found = torch.autograd.grad(loss(flat), flat, create_graph=True)[0]
            return found if torch.is_grad_enabled() and name == 'SGDHess' else found.detach()

        return gradient

    data = batches(25, torch.float64)
    reference = specifications.BASES[base]()
    expected = specifications.follow(name, values, reference, [gradient_of(batch) for batch in data], start, pieces)

    optimizer = SharpnessAwareOptimizer(BASES[base](model.parameters()), registry[name](**values), model)
    for batch in data:
        optimizer.step(Closure(model, batch, graph=needs_graph(name)))
    found = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert (found - start).norm() > 0.1  # it went somewhere
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

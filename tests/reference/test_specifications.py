"""The engine's trajectory beside the specification's, fp64, 25 steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from composer_sam import SharpnessAwareOptimizer, registry
from tests.problems import BASES, Closure, batches, network
from tests.reference import specifications

# Hyper-parameters other than the defaults, so that none can be ignored unnoticed.
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ('SAM', {}),
    ('SAM', {'rho': 0.7, 'epsilon': 0.3}),
]


def test_every_method_has_a_specification() -> None:
    assert set(specifications.SPECIFICATIONS) == set(registry)
    assert {name for name, _ in SETTINGS} == set(registry)


@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize(('name', 'values'), SETTINGS)
def test_trajectory_equals_specification(name: str, values: dict[str, Any], base: str) -> None:
    model = network(torch.float64, dropout=0.0)
    parameters = dict(model.named_parameters())
    optimizer = SharpnessAwareOptimizer(BASES[base](model.parameters()), registry[name](**values), model)
    reference, w = specifications.BASES[base](), nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    data = batches(25, torch.float64)
    start = w.clone()
    for batch in data:
        x, y = batch

        def gradient(flat: torch.Tensor, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            flat = flat.clone().requires_grad_()
            pieces = flat.split([p.numel() for p in parameters.values()])
            values = {n: piece.view_as(p) for (n, p), piece in zip(parameters.items(), pieces, strict=True)}
            loss = nn.functional.cross_entropy(functional_call(model, values, (x,)), y)
            return torch.autograd.grad(loss, flat)[0]

        w = reference.step(w, specifications.SPECIFICATIONS[name](gradient, w, **values))
        optimizer.step(Closure(model, batch))
    found = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert (found - start).norm() > 0.1  # it went somewhere
    torch.testing.assert_close(found, w, rtol=1e-10, atol=1e-13)

"""Sharpness and flatness against closed forms on quadratics, and their invariances."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

import pytest
import torch
from quadratic import Quadratic, ball_maximum, batches, classifier, flat, mean_output
from torch import Tensor, nn

from composer_sam import ASAM, SAM, SharpnessAwareOptimizer
from composer_sam.diagnostics import (
    MEASURES,
    MeasureOptions,
    Objective,
    adaptive_sharpness,
    average_sharpness,
    first_order_flatness,
    measure,
    sam_sharpness,
    top_eigenvalues,
    trace,
)
from composer_sam.diagnostics.checks import NotFiniteError

cross_entropy = nn.functional.cross_entropy
RHO = 0.3
SPECTRA = {
    'convex': [5.0, 2.0, 1.0, 0.5, 0.1, 0.0],
    'indefinite': [3.0, 1.0, 0.2, -1.0, -4.0, -8.0],
    'concave': [-0.5, -1.0, -2.0, -3.0, -5.0, -9.0],
}
every_spectrum = pytest.mark.parametrize('spectrum', SPECTRA)


def quadratic(spectrum: str, gradient: float = 1.0) -> Quadratic:
    return Quadratic.with_eigenvalues(SPECTRA[spectrum], gradient=gradient)


# SAM's.


@every_spectrum
@pytest.mark.parametrize('gradient', [1.0, 0.05])
def test_projected_ascent_finds_the_maximum_of_a_quadratic(spectrum: str, gradient: float) -> None:
    model = quadratic(spectrum, gradient)
    found = sam_sharpness(model, mean_output, model.data(), RHO, steps=300)
    assert found.value == pytest.approx(ball_maximum(model.matrix, model.gradient(), RHO), rel=1e-6)
    assert found.loss == pytest.approx(Objective(model, mean_output, model.data()).value(), rel=1e-12)


@every_spectrum
def test_first_order_is_the_loss_at_sams_point(spectrum: str) -> None:
    model = quadratic(spectrum)
    g = model.gradient()
    e = RHO * g / g.norm()
    expected = (g @ e + e @ model.matrix @ e / 2).item()
    for ascent in ('first_order', 'projected'):
        found = sam_sharpness(model, mean_output, model.data(), RHO, ascent=ascent, steps=2)
        assert found.first_order == pytest.approx(expected, rel=1e-9)
    assert sam_sharpness(model, mean_output, model.data(), RHO, ascent='first_order').value == found.first_order


@pytest.mark.parametrize('steps', [0, 1, 5, 50])
def test_projected_is_never_below_first_order_nor_negative(steps: int) -> None:
    for model in [quadratic(spectrum) for spectrum in SPECTRA]:
        found = sam_sharpness(model, mean_output, model.data(), 2.0, steps=steps)
        assert found.value >= max(found.first_order, 0)
    found = sam_sharpness(classifier(), cross_entropy, batches(), 1.0, steps=steps)
    assert found.value >= found.first_order > 0


def test_default_steps_come_close_on_a_network() -> None:
    short, long = (sam_sharpness(classifier(), cross_entropy, batches(), 0.5, steps=steps) for steps in (20, 400))
    assert short.value == pytest.approx(long.value, rel=1e-3)


def test_at_a_minimum_it_is_half_the_top_eigenvalue() -> None:
    """No gradient to follow: the ascent starts from a random point."""
    model = quadratic('convex', gradient=0.0)
    exact = Quadratic(model.matrix, torch.zeros(6).double(), torch.zeros(6).double())
    found = sam_sharpness(exact, mean_output, model.data(), RHO, steps=300)
    assert found.first_order == 0.0
    assert found.value == pytest.approx(RHO**2 * 5 / 2, rel=1e-6)
    a, b, c = (sam_sharpness(exact, mean_output, model.data(), RHO, steps=4, seed=seed).value for seed in (0, 0, 1))
    assert a == b != c
    assert sam_sharpness(exact, mean_output, model.data(), RHO, ascent='first_order').value == 0.0


def test_first_order_point_is_where_sam_takes_its_ascent_gradient() -> None:
    model = classifier().eval()
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    found = sam_sharpness(model, cross_entropy, batches(), 0.3, ascent='first_order')
    adaptive = adaptive_sharpness(model, cross_entropy, batches(), 0.5, eta=0.02, ascent='first_order')
    for method, sharpness in ((SAM(rho=0.3), found), (ASAM(rho=0.5, eta=0.02), adaptive)):
        stepped = copy.deepcopy(model)
        optimizer = SharpnessAwareOptimizer(torch.optim.SGD(stepped.parameters(), lr=0.0), method, stepped)
        losses = []

        def closure(**_: Any) -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = cross_entropy(stepped(x), y)  # noqa: B023
            loss.backward()
            losses.append(loss.item())  # noqa: B023
            return loss

        optimizer.step(closure)
        assert losses[1] - losses[0] == pytest.approx(sharpness.value, rel=1e-9)


def test_m_sharpness_is_the_mean_over_groups() -> None:
    model = classifier()
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    groups = [(x[i : i + 6], y[i : i + 6]) for i in (0, 6, 12, 18)]
    for function in (sam_sharpness, adaptive_sharpness):
        parts = [function(model, cross_entropy, [group], 0.3, steps=5) for group in groups]
        found = function(model, cross_entropy, batches(), 0.3, steps=5, m=6)
        for name in ('value', 'first_order', 'loss'):
            expected = sum(getattr(p, name) * len(g[0]) / 20 for p, g in zip(parts, groups, strict=True))
            assert getattr(found, name) == pytest.approx(expected, rel=1e-9)
    whole = sam_sharpness(model, cross_entropy, batches(), 0.3, steps=5)
    assert sam_sharpness(model, cross_entropy, batches(), 0.3, steps=5, m=99).value == pytest.approx(whole.value)
    assert sam_sharpness(model, cross_entropy, batches(), 0.3, steps=5, m=1).value > whole.value


# Adaptive.


@every_spectrum
def test_adaptive_is_the_maximum_over_the_scaled_ball(spectrum: str) -> None:
    """With e = T u the quadratic has the Hessian T H T and the gradient T g over a round ball."""
    model = quadratic(spectrum)
    t = torch.cat([model.weight.detach().reshape(-1).abs() + 0.05, torch.ones(3).double()])
    expected = ball_maximum(t[:, None] * model.matrix * t, t * model.gradient(), RHO)
    found = adaptive_sharpness(model, mean_output, model.data(), RHO, eta=0.05, steps=300)
    assert found.value == pytest.approx(expected, rel=1e-6)
    g = model.gradient()
    e = RHO * t * t * g / (t * g).norm()
    assert found.first_order == pytest.approx((g @ e + e @ model.matrix @ e / 2).item(), rel=1e-9)


def test_adaptive_does_not_change_when_layers_are_rescaled() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)).double()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        first, last = scaled.parameters()
        first.mul_(10)
        last.div_(10)
    values = [adaptive_sharpness(m, cross_entropy, batches(), 0.3, eta=0.0) for m in (model, scaled)]
    assert values[0].value == pytest.approx(values[1].value, rel=1e-9)
    plain = [sam_sharpness(m, cross_entropy, batches(), 0.3).value for m in (model, scaled)]
    assert plain[1] > 2 * plain[0]


# On average.


def test_average_on_a_quadratic_is_the_trace() -> None:
    model = quadratic('indefinite', gradient=10.0)
    found = average_sharpness(model, mean_output, model.data(), RHO, draws=2000)
    expected = RHO**2 / (2 * 6) * sum(SPECTRA['indefinite'])
    assert abs(found.value - expected) < 3 * found.stderr
    theory = RHO**2 / 6 * (torch.tensor(SPECTRA['indefinite']).square().sum() / 2).sqrt().item() / 2000**0.5
    assert found.stderr == pytest.approx(theory, rel=0.1)


# First-order flatness.


@every_spectrum
def test_flatness_of_a_quadratic(spectrum: str) -> None:
    """|g + H e|^2 is a quadratic itself, with gradient 2 H g and Hessian 2 H^2."""
    model = quadratic(spectrum)
    g, matrix = model.gradient(), model.matrix
    square = g @ g + ball_maximum(2 * matrix @ matrix, 2 * matrix @ g, RHO)
    found = first_order_flatness(model, mean_output, model.data(), RHO, steps=400)
    assert found.value == pytest.approx(RHO * square.sqrt().item(), rel=1e-6)
    assert found.gradient_norm == pytest.approx(g.norm().item(), rel=1e-9)
    e = RHO * matrix @ g / (matrix @ g).norm()
    assert found.first_order == pytest.approx(RHO * (g + matrix @ e).norm().item(), rel=1e-9)
    assert first_order_flatness(model, mean_output, model.data(), RHO, ascent='first_order').value == found.first_order


@every_spectrum
def test_flatness_at_a_stationary_point_is_the_largest_curvature(spectrum: str) -> None:
    matrix = quadratic(spectrum).matrix
    model = Quadratic(matrix, torch.zeros(6).double(), torch.zeros(6).double())
    found = first_order_flatness(model, mean_output, model.data(), RHO, steps=400)
    top = top_eigenvalues(model, mean_output, model.data(), which='magnitude').values[0]
    assert found.value == pytest.approx(RHO**2 * abs(top), rel=1e-5)


def test_flatness_bounds_sharpness() -> None:
    for seed in range(3):
        model = classifier(seed=seed)
        flatness = first_order_flatness(model, cross_entropy, batches(), 0.2)
        assert flatness.value >= flatness.first_order > 0
        assert flatness.value > sam_sharpness(model, cross_entropy, batches(), 0.2).value > 0


@pytest.mark.parametrize('measured', [sam_sharpness, adaptive_sharpness, first_order_flatness, average_sharpness])
def test_fp32_agrees_with_fp64_and_repeats(measured: Any) -> None:
    single, again, double = (
        measured(classifier(dtype), cross_entropy, batches(dtype), 0.5).value
        for dtype in (torch.float32, torch.float32, torch.float64)
    )
    assert single == again
    assert single == pytest.approx(double, rel=0.3 if measured is average_sharpness else 1e-3)


# All at once.


def test_measure_is_what_the_functions_say() -> None:
    given = classifier(), cross_entropy, batches()
    found = measure(*given, k=2, probes=12, steps=5, seed=3)
    assert found.loss == Objective(*given).value()
    assert found.gradient_norm == pytest.approx(flat(Objective(*given).gradient()).norm().item(), rel=1e-6)
    assert found.eigenvalues == top_eigenvalues(*given, k=2, seed=3).values
    estimate = trace(*given, estimator='hutch++', probes=12, seed=3)
    assert (found.trace, found.trace_stderr) == (estimate.value, estimate.stderr)
    assert found.sam_sharpness == sam_sharpness(*given, rho=0.05, steps=5, seed=3).value
    assert found.adaptive_sharpness == adaptive_sharpness(*given, rho=0.5, steps=5, seed=3).value
    assert found.first_order_flatness == first_order_flatness(*given, rho=0.2, steps=5, seed=3).value
    assert (found.samples, found.seed) == (20, 3)
    assert found.seconds > 0
    assert list(found.as_dict()) == [
        *('loss', 'gradient_norm', 'top_eigenvalue', 'eigenvalue_2', 'trace', 'trace_stderr', 'sam_sharpness'),
        *('adaptive_sharpness', 'first_order_flatness', 'samples', 'seed', 'seconds'),
    ]
    assert found.as_dict()['top_eigenvalue'] == found.top_eigenvalue


@pytest.mark.parametrize('name', MEASURES)
def test_measure_takes_only_what_was_asked_for(name: str) -> None:
    found = measure(classifier(), cross_entropy, batches(), measures=[name], probes=6, steps=1).as_dict()
    assert set(found) == {name, 'samples', 'seed', 'seconds'} | ({'trace_stderr'} if name == 'trace' else set())


def test_the_keywords_of_measure_are_its_options() -> None:
    parameters = inspect.signature(measure).parameters
    options = {field.name: field.default for field in dataclasses.fields(MeasureOptions)}
    assert {name: parameters[name].default for name in options} == options
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert list(parameters)[:3] == ['model', 'loss', 'batches']
    with pytest.raises(TypeError, match="unexpected keyword argument 'radius'"):
        measure(classifier(), cross_entropy, batches(), radius=0.1)


# Refusals.


@pytest.mark.parametrize(
    ('function', 'arguments', 'message'),
    [
        (sam_sharpness, {'rho': 0.0}, 'rho must be a finite number > 0, got 0.0'),
        (sam_sharpness, {'rho': float('inf')}, 'rho must be a finite number > 0, got inf'),
        (sam_sharpness, {'steps': -1}, 'steps must be an integer >= 0, got -1'),
        (sam_sharpness, {'ascent': 'newton'}, "ascent must be one of 'first_order', 'projected', got 'newton'"),
        (sam_sharpness, {'m': 0}, 'm must be an integer >= 1 or None, got 0'),
        (adaptive_sharpness, {'eta': -0.1}, 'eta must be a finite number >= 0, got -0.1'),
        (adaptive_sharpness, {'rho': -1}, 'rho must be a finite number > 0, got -1'),
        (average_sharpness, {'draws': 1}, 'draws must be an integer >= 2, got 1'),
        (average_sharpness, {'rho': float('nan')}, 'rho must be a finite number > 0, got nan'),
        (first_order_flatness, {'rho': 0}, 'rho must be a finite number > 0, got 0'),
        (first_order_flatness, {'ascent': ''}, "ascent must be one of 'first_order', 'projected', got ''"),
        (measure, {'measures': 'loss'}, "measures must be some of 'loss', .*, got 'loss'"),
        (measure, {'measures': ['los']}, r"measures must be some of .*, got \['los'\]"),
        (measure, {'measures': []}, 'measures must be some of'),
        (measure, {'k': 0}, 'k must be an integer >= 1, got 0'),
        (measure, {'probes': 3}, 'probes must be an integer >= 6, got 3'),
        (measure, {'adaptive_rho': 0}, 'adaptive_rho must be a finite number > 0, got 0'),
        (measure, {'flatness_rho': 0}, 'flatness_rho must be a finite number > 0, got 0'),
        (measure, {'tol': -1}, 'tol must be a finite number > 0, got -1'),
    ],
)
def test_bad_values_are_named(function: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(classifier(), cross_entropy, batches(), **arguments)


class Pole(nn.Module):
    """-log(1 - |w|): finite at w = 0, and not from |w| = 1 on."""

    def __init__(self, at: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), at))

    def forward(self, x: Tensor) -> Tensor:
        return (-torch.log(1 - self.weight)).expand(len(x))


@pytest.mark.parametrize('function', [sam_sharpness, adaptive_sharpness, first_order_flatness, average_sharpness])
def test_a_loss_that_is_not_finite_is_an_error_that_says_where(function: Any) -> None:
    data = [(torch.zeros(2, 1), torch.zeros(2))]
    with pytest.raises(NotFiniteError, match='is (nan|inf) at the weights'):
        function(Pole(2.0), mean_output, data, 0.1)
    with pytest.raises(NotFiniteError, match='rho=4.0; a smaller rho may help'):
        function(Pole(0.9), mean_output, data, 4.0)

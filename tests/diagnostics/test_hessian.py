"""Eigenvalues, trace and density against the exact dense Hessian and closed forms."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from quadratic import Quadratic, batches, classifier, dense_hessian, flat, mean_output
from torch import Tensor, nn
from torch.testing import assert_close

from composer_sam.diagnostics import Objective, measure, spectral_density, top_eigenvalues, trace
from composer_sam.diagnostics.checks import NotConvergedError, NotFiniteError
from composer_sam.diagnostics.hessian import _Counted
from composer_sam.diagnostics.lanczos import quadrature

cross_entropy = nn.functional.cross_entropy
both_precisions = pytest.mark.parametrize('dtype', [torch.float64, torch.float32])


@pytest.fixture(scope='module')
def exact() -> np.ndarray:
    """The spectrum in fp64, descending."""
    return np.linalg.eigvalsh(dense_hessian(classifier(), batches()).numpy())[::-1].copy()


def objective(dtype: torch.dtype = torch.float64) -> Objective:
    return Objective(classifier(dtype), cross_entropy, batches(dtype), microbatch=6)


# Eigenvalues.


@both_precisions
@pytest.mark.parametrize('k', [1, 4])
def test_top_eigenvalues_are_the_dense_hessians(dtype: torch.dtype, k: int, exact: np.ndarray) -> None:
    found = top_eigenvalues(classifier(dtype), cross_entropy, batches(dtype), k=k)
    assert found.values == pytest.approx(exact[:k], rel=1e-4)
    matrix = dense_hessian(classifier(), batches())
    for value, vector, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        v = flat(vector).double()
        assert v.norm().item() == pytest.approx(1, abs=1e-5)
        assert (matrix @ v - value * v).norm().item() == pytest.approx(residual, rel=1e-2, abs=1e-5)
        assert residual <= 2e-3 * abs(value)
        assert v[v.abs().argmax()] > 0
        assert [part.shape for part in vector] == [p.shape for p in objective().parameters]


def test_which_end_of_the_spectrum() -> None:
    model = Quadratic.with_eigenvalues([3.0, 2.0, *np.linspace(-1, 1, 24), -5.0, -7.0])
    given = model, mean_output, model.data()
    assert top_eigenvalues(*given, k=2).values == pytest.approx([3, 2], rel=1e-4)
    assert top_eigenvalues(*given, k=3, which='magnitude').values == pytest.approx([-7, -5, 3], rel=1e-4)
    assert top_eigenvalues(*given, k=2, which='smallest').values == pytest.approx([-7, -5], rel=1e-4)


@pytest.mark.parametrize('which', ['largest', 'magnitude', 'smallest'])
def test_as_many_eigenvalues_as_there_are_parameters(which: str) -> None:
    model = Quadratic.with_eigenvalues([3.0, 1.0, 1.0, -2.0])
    expected = {'largest': [3, 1, 1, -2], 'magnitude': [3, -2, 1, 1], 'smallest': [-2, 1, 1, 3]}[which]
    found = top_eigenvalues(model, mean_output, model.data(), k=4, which=which)
    assert found.values == pytest.approx(expected, rel=1e-9)
    assert max(found.residuals) < 1e-9
    assert top_eigenvalues(model, mean_output, model.data(), k=2, which=which).values == pytest.approx(expected[:2])


@pytest.mark.parametrize('size', [5, 40])
def test_a_multiple_of_the_identity(size: int) -> None:
    """All that H makes of one vector lies in its direction: the case in which Lanczos needs new directions."""
    model = Quadratic.with_eigenvalues([2.0] * size)
    runs = [top_eigenvalues(model, mean_output, model.data(), k=3) for _ in range(2)]
    assert runs[0].values == runs[1].values == pytest.approx([2, 2, 2], rel=1e-9)
    directions = torch.stack([flat(v) for v in runs[0].vectors])
    assert_close(directions @ directions.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_same_seed_gives_the_same_bits_and_another_the_same_eigenvalue() -> None:
    a, b, c = (top_eigenvalues(objective(torch.float32), k=2, seed=seed) for seed in (0, 0, 1))
    assert a.values == b.values
    assert all(torch.equal(flat(v), flat(w)) for v, w in zip(a.vectors, b.vectors, strict=True))
    assert a.values == pytest.approx(c.values, rel=1e-4)
    assert_close(flat(a.vectors[0]), flat(c.vectors[0]), rtol=0, atol=5e-3)


def test_a_tighter_tolerance_leaves_smaller_residuals() -> None:
    loose, tight = (top_eigenvalues(objective(), k=3, tol=tol) for tol in (1e-2, 1e-9))
    assert max(tight.residuals) < 1e-7 < max(loose.residuals)
    assert tight.products > loose.products


def test_no_convergence_says_what_was_reached() -> None:
    model = Quadratic.with_eigenvalues(np.linspace(0, 1, 300).tolist())
    with pytest.raises(NotConvergedError) as caught:
        top_eigenvalues(model, mean_output, model.data(), k=3, tol=1e-9, max_iterations=30)
    found = re.search(r'in (\d+) Hessian products: of 3 eigenvalues .*largest is at least ([\d.]+)', str(caught.value))
    assert found
    assert int(found[1]) <= 45
    assert 0.3 < float(found[2]) <= 1


def test_progress_counts_products(capsys: pytest.CaptureFixture[str]) -> None:
    found = top_eigenvalues(objective(), progress=True)
    assert capsys.readouterr().err.endswith(f'Hessian products: {found.products}\n')
    top_eigenvalues(objective())
    assert not capsys.readouterr().err


# The trace.


@both_precisions
@pytest.mark.parametrize('estimator', ['hutchinson', 'hutch++'])
def test_trace_within_its_standard_error(dtype: torch.dtype, estimator: str, exact: np.ndarray) -> None:
    found = trace(objective(dtype), estimator=estimator, probes=240 if estimator == 'hutchinson' else 60)
    assert found.products == (240 if estimator == 'hutchinson' else 60)
    assert abs(found.value - exact.sum()) < 3 * found.stderr + 1e-5 * exact.sum()
    assert 0 < found.stderr < 0.2 * exact.sum()


def test_hutchinsons_standard_error_is_the_theoretical_one() -> None:
    """Random signs: the variance of z H z is twice the sum of the squared off-diagonal elements."""
    matrix = dense_hessian(classifier(), batches())
    off = matrix - torch.diag(matrix.diagonal())
    expected = (2 * off.square().sum()).sqrt().item() / 500**0.5
    assert trace(objective(), probes=500).stderr == pytest.approx(expected, rel=0.15)


def test_unit_vectors_as_probes_give_the_exact_trace(exact: np.ndarray) -> None:
    operator = _Counted(objective())
    size = len(exact)
    units = size**0.5 * torch.eye(size, dtype=torch.float64)
    mean = sum(float(unit @ operator(unit)) for unit in units) / size
    assert mean == pytest.approx(exact.sum(), rel=1e-10)


def test_signs_are_exact_for_a_diagonal_hessian() -> None:
    eigenvalues = torch.tensor([4.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    model = Quadratic(torch.diag(eigenvalues), torch.zeros(4).double(), torch.ones(4).double())
    found = trace(model, mean_output, model.data(), probes=2)
    assert found.value == pytest.approx(5.5, rel=1e-12)
    assert found.stderr == pytest.approx(0, abs=1e-12)


def test_hutch_plus_plus_is_exact_on_low_rank_and_on_few_parameters() -> None:
    model = Quadratic.with_eigenvalues([5.0, -3.0, 2.0] + [0.0] * 27)
    found = trace(model, mean_output, model.data(), estimator='hutch++', probes=12)
    assert found.value == pytest.approx(4, rel=1e-9)
    assert found.stderr < 1e-9
    small = Quadratic.with_eigenvalues([5.0, -3.0, 2.0, 1.0])
    found = trace(small, mean_output, small.data(), estimator='hutch++', probes=30)
    assert (found.value, found.stderr) == (pytest.approx(5, rel=1e-9), 0.0)


def test_hutch_plus_plus_beats_hutchinson_where_few_eigenvalues_dominate() -> None:
    model = Quadratic.with_eigenvalues([100.0, 50.0, 20.0, *np.linspace(-0.1, 0.1, 57)])
    errors = {
        estimator: [
            abs(trace(model, mean_output, model.data(), estimator=estimator, probes=15, seed=seed).value - 170)
            for seed in range(10)
        ]
        for estimator in ('hutchinson', 'hutch++')
    }
    assert np.mean(errors['hutch++']) < 0.05 * np.mean(errors['hutchinson'])


def test_trace_repeats_under_a_seed() -> None:
    a, b, c = (trace(objective(torch.float32), probes=4, seed=seed) for seed in (0, 0, 1))
    assert a == b != c


# The spectral density.


@both_precisions
def test_moments_of_the_quadrature_are_those_of_the_hessian(dtype: torch.dtype) -> None:
    """Gauss quadrature of m nodes: exact for v H^p v up to p = 2m - 1."""
    matrix = dense_hessian(classifier(), batches())
    steps = 6
    start = flat(objective().gaussian(5))
    nodes, weights = quadrature(_Counted(objective(dtype)), start.to(dtype), steps)
    v = start / start.norm()
    power = v
    for p in range(2 * steps):
        scale = float(matrix.norm()) ** p
        assert (weights * nodes**p).sum() / scale == pytest.approx(float(v @ power) / scale, rel=1e-3, abs=1e-6)
        power = matrix @ power


def test_as_many_steps_as_parameters_find_every_eigenvalue(exact: np.ndarray) -> None:
    found = spectral_density(objective(), steps=1000, probes=1, points=20000)
    visible = exact[np.abs(exact) > 1e-3 * exact[0]]
    assert found.nodes.max() == pytest.approx(exact[0], rel=1e-9)
    for value in visible:
        assert np.abs(found.nodes - value).min() < 1e-6 * exact[0]


@both_precisions
def test_the_density_integrates_to_one_and_has_the_hessians_mean(dtype: torch.dtype, exact: np.ndarray) -> None:
    found = spectral_density(objective(dtype), steps=20, probes=12)
    width = found.grid[1] - found.grid[0]
    assert found.density.sum() * width == pytest.approx(1, abs=1e-6)
    assert found.weights.sum() == pytest.approx(1, abs=1e-9)
    assert (found.density >= 0).all()
    mean = (found.grid * found.density).sum() * width
    means = 12 * (found.nodes * found.weights).reshape(12, 20).sum(axis=1)
    assert mean == pytest.approx(means.mean(), rel=1e-6)
    assert mean == pytest.approx(exact.mean(), abs=4 * means.std() / 12**0.5)
    assert found.products == 240


def test_the_density_of_two_values_is_two_gaussians() -> None:
    model = Quadratic.with_eigenvalues([1.0] * 30 + [4.0] * 10)
    found = spectral_density(model, mean_output, model.data(), probes=60, sigma=0.1)
    width = found.grid[1] - found.grid[0]
    low = found.density[found.grid < 2.5].sum() * width
    assert low == pytest.approx(0.75, abs=0.05)
    assert found.grid[found.density.argmax()] == pytest.approx(1, abs=0.02)
    assert found.density.max() == pytest.approx(low / (0.1 * (2 * np.pi) ** 0.5), rel=1e-2)
    assert len(found.nodes) == 120


# Refusals.


def test_without_scipy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ('scipy.sparse.linalg', 'scipy.linalg'):
        monkeypatch.setitem(sys.modules, module, None)
    message = r"^computing eigenvalues of the Hessian needs scipy\S*, .*: pip install 'composer-sam\[diagnostics\]'$"
    with pytest.raises(ModuleNotFoundError, match=message):
        top_eigenvalues(objective())
    with pytest.raises(
        ModuleNotFoundError, match=r"^the spectral density .*: pip install 'composer-sam\[diagnostics\]'$"
    ):
        spectral_density(objective())
    assert trace(objective(), probes=2).products == 2
    assert measure(objective(), measures=['loss', 'trace'], probes=6).trace is not None


def test_scipy_is_imported_for_eigenvalues_only() -> None:
    code = 'import sys, composer_sam.diagnostics; print([name for name in sys.modules if name.startswith("scipy")])'
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert found.stdout == '[]\n'


@pytest.mark.parametrize(
    ('function', 'arguments', 'message'),
    [
        (top_eigenvalues, {'k': 0}, 'k must be an integer >= 1, got 0'),
        (top_eigenvalues, {'k': 74}, 'k must be at most the number of trainable parameters, 73, got 74'),
        (top_eigenvalues, {'which': 'top'}, "which must be one of 'largest', 'magnitude', 'smallest', got 'top'"),
        (top_eigenvalues, {'tol': 0.0}, 'tol must be a finite number > 0, got 0.0'),
        (top_eigenvalues, {'max_iterations': 0}, 'max_iterations must be an integer >= 1, got 0'),
        (trace, {'probes': 1}, 'probes must be an integer >= 2, got 1'),
        (trace, {'probes': 5, 'estimator': 'hutch++'}, 'probes must be an integer >= 6, got 5'),
        (trace, {'estimator': 'exact'}, "estimator must be 'hutchinson' or 'hutch\\+\\+', got 'exact'"),
        (spectral_density, {'steps': 1}, 'steps must be an integer >= 2, got 1'),
        (spectral_density, {'probes': 0}, 'probes must be an integer >= 1, got 0'),
        (spectral_density, {'points': 1.5}, 'points must be an integer >= 2, got 1.5'),
        (spectral_density, {'sigma': -1.0}, 'sigma must be a finite number > 0, got -1.0'),
        (spectral_density, {'sigma': 1e-9}, 'points must be >= [0-9]+ for the grid to resolve sigma=1e-09, got 1024'),
    ],
)
def test_bad_values_are_named(function: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(classifier(), cross_entropy, batches(), **arguments)


@pytest.mark.parametrize('function', [top_eigenvalues, trace, spectral_density])
def test_a_hessian_that_is_not_finite_is_an_error(function: Any) -> None:
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) * float('nan')

    with pytest.raises(NotFiniteError, match='the Hessian product is not finite'):
        function(classifier(), broken, batches())

"""Properties of the vector mathematics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_sam.vectors import (
    Layout,
    PerParameter,
    Vector,
    add,
    algebra,
    axpy,
    clip,
    dot,
    dots,
    multiply,
    norm,
    norms,
    reject,
    restrict,
    scale,
    subtract,
    to_radius,
)

SHAPES = [(3, 4), (), (5,), (2, 1, 3)]


def vector(seed: int, dtype: torch.dtype = torch.float64, where: tuple[int, ...] = (0, 1, 2, 3)) -> Vector:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    layout = Layout([torch.zeros(shape, dtype=dtype) for shape in SHAPES])
    return Vector([values[i] for i in where], where, layout)


def flat(x: Vector) -> torch.Tensor:
    full = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for i, value in zip(x.where, x.values, strict=True):
        full[i] = value.double()
    return torch.cat([value.reshape(-1) for value in full])


seeds = st.integers(0, 2**31)
places = st.sets(st.integers(0, 3)).map(lambda chosen: tuple(sorted(chosen)))
radii = st.floats(1e-6, 1e6)


@given(seeds, places)
def test_norm_is_the_norm_of_the_flat_vector(seed: int, where: tuple[int, ...]) -> None:
    x = vector(seed, where=where)
    torch.testing.assert_close(norm(x), flat(x).norm(), rtol=1e-12, atol=0)


@given(seeds, seeds, places, places)
def test_sums_and_products_of_vectors_with_different_zeros(
    a: int, b: int, p: tuple[int, ...], q: tuple[int, ...]
) -> None:
    x, y = vector(a, where=p), vector(b, where=q)
    expected = [flat(x) + flat(y), flat(x) - flat(y)]
    for found, value in zip((add(x, y), subtract(x, y)), expected, strict=True):
        assert torch.equal(flat(found), value)
    torch.testing.assert_close(flat(axpy(2.5, x, y)), 2.5 * flat(x) + flat(y), rtol=1e-14, atol=1e-14)
    assert torch.equal(flat(axpy(2.5, x, vector(b, where=q).donate())), flat(axpy(2.5, x, y)))
    assert torch.equal(flat(multiply(x, y)), flat(x) * flat(y))
    torch.testing.assert_close(dot(x, y), flat(x) @ flat(y), rtol=1e-12, atol=1e-14)
    assert torch.equal(flat(add(vector(a, where=p).donate(), y)), expected[0])
    assert torch.equal(flat(add(y, vector(a, where=p).donate())), expected[0])
    assert torch.equal(flat(subtract(vector(a, where=p).donate(), y)), expected[1])


@given(seeds, radii)
def test_to_radius_has_the_radius_and_the_direction(seed: int, rho: float) -> None:
    x = vector(seed)
    e = to_radius(x, rho)
    assert math.isclose(norm(e).item(), rho, rel_tol=1e-9)
    torch.testing.assert_close(flat(e) / rho, flat(x) / flat(x).norm(), rtol=1e-9, atol=1e-12)
    assert torch.equal(flat(to_radius(vector(seed).donate(), rho)), flat(e))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@given(seed=seeds)
def test_half_precision_offsets_are_rounded_once(seed: int, dtype: torch.dtype) -> None:
    x = vector(seed, dtype)
    e = to_radius(x, 0.05)
    exact = 0.05 * flat(x) / flat(x).norm()
    # One rounding of the exact product, up to ties that fp32 accumulation may turn.
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(flat(e), exact, rtol=0.5001 * ulp, atol=1e-7)
    assert all(value.dtype == dtype for value in e.values)
    assert torch.equal(flat(to_radius(vector(seed, dtype).donate(), 0.05)), flat(e))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_one_coefficient_for_all_parameters_is_a_number_in_half_precision_too(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product of a coefficient and a vector would be a copy of the parameters."""
    expected = flat(axpy(0.01, vector(0, dtype), vector(1, dtype)))
    monkeypatch.setattr(algebra, 'scale', None)
    assert torch.equal(flat(axpy(PerParameter([0.01] * 4), vector(0, dtype), vector(1, dtype))), expected)


def test_half_precision_norm_accumulates_in_fp32() -> None:
    ones = torch.full((100_000,), 0.01, dtype=torch.bfloat16)
    x = Vector([ones], [0], Layout([ones]))
    assert norm(x).dtype == torch.float32
    assert math.isclose(norm(x).item(), ones.double().norm().item(), rel_tol=1e-4)


@given(seeds, radii, radii)
def test_per_parameter_radii_share_one_norm(seed: int, a: float, b: float) -> None:
    x = vector(seed)
    e = to_radius(x, PerParameter([a, a, b, b]))
    for i, value in enumerate(e.values):
        torch.testing.assert_close(value, (a if i < 2 else b) * x.values[i] / flat(x).norm(), rtol=1e-9, atol=0)


@pytest.mark.parametrize('epsilon', [0.0, 1e-12, 1.0])
def test_the_zero_vector_stays_zero(epsilon: float) -> None:
    x = vector(0)
    zero = subtract(x, x)
    assert not flat(to_radius(zero, 1.0, epsilon)).any()
    assert norm(vector(0, where=())) == 0


def test_a_donated_vector_cannot_be_read_again() -> None:
    x = vector(0)
    memory = [value.data_ptr() for value in x.values]
    moved = scale(x.donate(), 3.0)
    assert [value.data_ptr() for value in moved.values] == memory
    with pytest.raises(RuntimeError, match='was donated'):
        norm(x)


@given(seeds, seeds, places, places)
def test_inner_products_taken_together_are_those_taken_singly(
    a: int, b: int, p: tuple[int, ...], q: tuple[int, ...]
) -> None:
    x, y = vector(a, where=p), scale(vector(b, where=q).donate(), 3.0)
    found = dots((x, x), (x, y), (y, y))
    y = 3.0 * flat(vector(b, where=q))
    for value, expected in zip(found, (flat(x) @ flat(x), flat(x) @ y, y @ y), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)


@given(seeds, seeds)
def test_a_multiple_that_waits_is_the_multiple(a: int, b: int) -> None:
    g, y = vector(a), vector(b)
    e = to_radius(g, 0.3)
    expected = 0.3 / flat(g).norm() * flat(g)
    torch.testing.assert_close(norm(e), expected.norm(), rtol=1e-10, atol=0)
    torch.testing.assert_close(flat(axpy(2.0, e, y)), 2 * expected + flat(y), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(flat(to_radius(e, 0.1)), expected / 3, rtol=1e-10, atol=0)
    torch.testing.assert_close(flat(e), expected, rtol=1e-10, atol=0)
    scale(g.donate(), 5.0).values[0].zero_()  # e was multiplied out into memory of its own
    torch.testing.assert_close(flat(e), expected, rtol=1e-10, atol=0)


def test_a_multiple_of_what_was_overwritten_cannot_be_read() -> None:
    x = vector(0)
    e = to_radius(x, 0.1)
    add(x.donate(), vector(1))
    with pytest.raises(RuntimeError, match='was overwritten'):
        norm(e)


@given(seeds, seeds)
def test_reject_is_orthogonal_and_leaves_the_rest(a: int, b: int) -> None:
    x, y = vector(a), vector(b)
    r = reject(x, y)
    if a != b:
        assert abs(dot(r, y).item()) < 1e-10 * norm(x).item() * norm(y).item()
    projection = flat(y) * (flat(x) @ flat(y)) / (flat(y) @ flat(y))
    torch.testing.assert_close(flat(r), flat(x) - projection, rtol=1e-9, atol=1e-12)


@given(seeds, radii)
def test_clip_is_torchs(seed: int, limit: float) -> None:
    x = vector(seed)
    parameters = [torch.nn.Parameter(torch.zeros_like(value)) for value in x.values]
    for parameter, value in zip(parameters, x.values, strict=True):
        parameter.grad = value.clone()
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    for found, parameter in zip(clip(x, limit).values, parameters, strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-12, atol=0)


@given(seeds, seeds, radii)
def test_a_metric_weighs_norm_and_offset(a: int, b: int, rho: float) -> None:
    x, t = vector(a), vector(b)
    e = to_radius(x, rho, 1e-3, t)
    expected = rho * flat(t) ** 2 * flat(x) / ((flat(t) * flat(x)).norm() + 1e-3)
    torch.testing.assert_close(flat(e), expected, rtol=1e-9, atol=0)
    donated = to_radius(vector(a).donate(), rho, 1e-3, t)
    assert torch.equal(flat(donated), flat(e))
    assert torch.equal(flat(x), flat(vector(a))) and torch.equal(flat(t), flat(vector(b)))


@given(seeds, places, places)
def test_restrict_keeps_the_chosen_parameters(seed: int, where: tuple[int, ...], kept: tuple[int, ...]) -> None:
    x = restrict(vector(seed, where=where), kept)
    assert x.where == tuple(sorted({*where} & {*kept}))
    assert torch.equal(flat(x), flat(vector(seed, where=x.where)))
    for length, value in zip(norms(x), x.values, strict=True):
        torch.testing.assert_close(length, value.norm(), rtol=1e-12, atol=0)

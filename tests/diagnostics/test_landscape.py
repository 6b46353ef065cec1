"""Directions, lines and planes through weight space, and their losses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from quadratic import Quadratic, mean_output
from small_network import around, axes, cross_entropy, data, network
from torch import nn

from composer_sam.diagnostics import Objective, top_eigenvalues
from composer_sam.landscapes.grid import evaluate, one_thread
from composer_sam.landscapes.subspaces import (
    Around,
    Subspace,
    Through,
    grid_axis,
    hessian_directions,
    random_directions,
    weights_of,
)


def test_filters_of_a_random_direction_have_the_norms_of_those_of_the_weights() -> None:
    model = network()
    model.linear.weight.data[2] = 0  # a dead row stays where it is
    (direction,) = random_directions(model, seed=3)
    assert set(direction) == {'0.weight', '5.weight'}  # no biases, no BatchNorm
    for name, part in direction.items():
        weight = dict(model.named_parameters())[name]
        torch.testing.assert_close(part.flatten(1).norm(dim=1), weight.detach().flatten(1).norm(dim=1))
    assert direction['0.weight'].flatten(1).norm(dim=1).shape == (3,)


def test_random_directions_depend_on_the_seed_and_only_on_it() -> None:
    model = network()
    before = torch.get_rng_state()
    first, second = random_directions(model, 3, 2)
    torch.manual_seed(99)
    again = random_directions(model, 3)[0]
    other = random_directions(model, 4)[0]
    torch.set_rng_state(before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert not any(torch.equal(first[name], second[name]) for name in first)
    # The same draws for other weights of the architecture: only the scale of every filter differs.
    scaled = copy.deepcopy(model)
    scaled.convolution.weight.data *= 2
    torch.testing.assert_close(random_directions(scaled, 3)[0]['0.weight'], 2 * first['0.weight'])


def test_frozen_parameters_do_not_move() -> None:
    model = network()
    model.convolution.weight.requires_grad_(False)
    assert set(random_directions(model, 0)[0]) == {'5.weight'}


def test_a_model_without_filters_has_no_random_direction() -> None:
    with pytest.raises(ValueError, match='need a trainable parameter of two or more dimensions'):
        random_directions(nn.BatchNorm1d(3), 0)


def test_the_centre_is_the_plain_evaluation_and_everything_is_as_before() -> None:
    model, batches = network(), data()
    model.train()
    cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [parameter.grad for parameter in model.parameters()]
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    stream = torch.get_rng_state()
    landscape = evaluate(around(model), model, cross_entropy, batches, axes(5))
    with one_thread():
        plain = Objective(model, cross_entropy, batches).value()
    assert landscape.loss[2, 2] == plain == landscape.marks[0].loss
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    assert landscape.accuracy is not None
    assert landscape.accuracy[2, 2] == right / 13 == landscape.marks[0].accuracy
    assert len(np.unique(landscape.loss)) == 25
    model.train()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(module.training for module in model.modules())


def test_a_point_is_the_loss_of_a_model_with_these_weights() -> None:
    model, batches = network(), data()
    u, v = random_directions(model, 5, 2)
    landscape = evaluate(
        around(model, seed=5), model, cross_entropy, batches, [np.array([-0.5, 2.0]), np.array([0.25])]
    )
    moved = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if name in u:
                parameter += 2.0 * u[name] + 0.25 * v[name]
        total = sum(cross_entropy(moved(x), y, reduction='sum').item() for x, y in batches)
    assert landscape.loss[0, 1] == pytest.approx(total / 13, rel=1e-6)


def test_weights_moved_after_the_subspace_was_made_do_not_move_it() -> None:
    model, batches = network(), data()
    subspace = around(model)
    expected = evaluate(subspace, model, cross_entropy, batches, axes(3)).loss
    model.load_state_dict(network(1).state_dict())
    assert np.array_equal(evaluate(subspace, model, cross_entropy, batches, axes(3)).loss, expected)


def test_along_the_eigenvectors_of_a_quadratic_the_loss_is_its_closed_form() -> None:
    model = Quadratic.with_eigenvalues([9, 4, 1, 0.5, 0.1, -1])
    directions, values = hessian_directions(model, mean_output, model.data(), 2)
    assert values == pytest.approx([9, 4], rel=1e-6)
    for direction in directions:
        assert sum(float(part.square().sum()) for part in direction.values()) == pytest.approx(1)
    subspace = Around.of(model, directions, ['u', 'v'], 'w')
    landscape = evaluate(subspace, model, mean_output, model.data(), axes(7, reach=0.8))
    x, y = np.meshgrid(*landscape.coordinates)
    slopes = [
        float(model.gradient() @ torch.cat([direction[name].reshape(-1) for name in ('weight', 'bias')]))
        for direction in directions
    ]
    expected = landscape.loss[3, 3] + slopes[0] * x + slopes[1] * y + (values[0] * x**2 + values[1] * y**2) / 2
    np.testing.assert_allclose(landscape.loss, expected, rtol=1e-6)
    assert landscape.accuracy is None  # its outputs are no scores of classes
    assert top_eigenvalues(model, mean_output, model.data()).values[0] == pytest.approx(9, rel=1e-6)


def test_random_surface_of_a_quadratic_is_its_closed_form() -> None:
    model = Quadratic.with_eigenvalues([5, 3, 1, 0.1])
    u, v = random_directions(model, 0, 2)
    landscape = evaluate(around(model), model, mean_output, model.data(), [grid_axis(-2, 2, 4), grid_axis(-1, 1, 3)])
    assert landscape.loss.shape == (3, 4)
    start = torch.cat([model.weight.detach().reshape(-1), model.bias.detach()])
    for row, y in enumerate(landscape.coordinates[1]):
        for column, x in enumerate(landscape.coordinates[0]):
            w = start.clone()
            w[:2] += x * u['weight'].reshape(-1) + y * v['weight'].reshape(-1)
            assert landscape.loss[row, column] == pytest.approx(float(w @ model.matrix @ w / 2 + model.vector @ w))


def through(models: Sequence[nn.Module]) -> Through:
    return Through.of([weights_of(model) for model in models], ['A', 'B', 'C'][: len(models)])


def own_losses(models: Sequence[nn.Module], batches: Any) -> list[float]:
    with one_thread():
        return [Objective(model, cross_entropy, batches).value() for model in models]


def test_a_line_has_the_checkpoints_at_its_ends_bit_for_bit() -> None:
    models, batches = [network(0), network(1)], data()
    landscape = evaluate(through(models), network(2), cross_entropy, batches, [grid_axis(-0.3, 1.3, 4)])
    (x,) = landscape.coordinates
    assert len(x) == 6 and (np.diff(x) > 0).all()  # the ends are added to the four
    ends = [landscape.loss[list(x).index(end)] for end in (0.0, 1.0)]
    assert ends == own_losses(models, batches) == [mark.loss for mark in landscape.marks]


def test_between_two_checkpoints_parameters_and_statistics_are_averaged() -> None:
    a, b = (weights_of(network(seed)) for seed in (0, 1))
    line = through([network(0), network(1)])
    middle, beyond = line.weights([0.25]), line.weights([1.5])
    for name in a.parameters:
        torch.testing.assert_close(middle[name], 0.75 * a.parameters[name] + 0.25 * b.parameters[name])
        torch.testing.assert_close(beyond[name], -0.5 * a.parameters[name] + 1.5 * b.parameters[name])
    for name in a.buffers:
        torch.testing.assert_close(middle[name], 0.75 * a.buffers[name] + 0.25 * b.buffers[name])
        assert torch.equal(beyond[name], b.buffers[name])  # an extrapolated variance could be negative
    assert '1.num_batches_tracked' not in middle


def test_a_plane_contains_its_three_checkpoints_and_keeps_distances() -> None:
    models, batches = [network(seed) for seed in (0, 1, 2)], data()
    plane = through(models)
    places = np.array([mark.at for mark in plane.marks])
    flat = [torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double() for model in models]
    for i in range(3):
        for j in range(i):
            distance = float((flat[i] - flat[j]).norm())
            assert np.linalg.norm(places[i] - places[j]) == pytest.approx(distance, rel=1e-9)
    coordinates = [np.unique(places[:, 0]), np.unique(places[:, 1])]
    landscape = evaluate(plane, network(3), cross_entropy, batches, coordinates)
    found = [landscape.loss[list(coordinates[1]).index(y), list(coordinates[0]).index(x)] for x, y in places.tolist()]
    assert found == own_losses(models, batches) == [mark.loss for mark in landscape.marks]
    # A point of the plane that is no corner: the middle of B and C.
    middle = plane.weights(((places[1] + places[2]) / 2).tolist())
    name, (b, c) = '5.weight', (models[1].linear.weight, models[2].linear.weight)
    torch.testing.assert_close(middle[name], ((b + c) / 2).detach())


def test_checkpoints_that_span_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match='A and B have the same weights'):
        through([network(0), network(0)])
    first, second = network(0), network(1)
    between = network(0)
    for p, q, r in zip(between.parameters(), first.parameters(), second.parameters(), strict=True):
        p.data = (q.data + 3 * r.data) / 4
    with pytest.raises(ValueError, match='A, B, C lie on one line'):
        through([first, second, between])


def test_recalibrated_statistics_are_those_of_the_samples() -> None:
    models, batches = [network(0), network(1)], data()
    model = network(2)
    landscape = evaluate(through(models), model, cross_entropy, batches, [np.array([0.0])], recalibrate=True)
    expected = copy.deepcopy(models[0])
    expected.norm.momentum = None
    expected.norm.reset_running_stats()
    expected.eval().norm.train()
    with torch.no_grad():
        for x, _ in batches:
            expected(x)
    assert landscape.loss[0] == own_losses([expected], batches)[0]
    assert landscape.loss[0] != own_losses([models[0]], batches)[0]
    assert model.norm.momentum == 0.1
    variance, untouched = model.norm.running_var, network(2).norm.running_var
    assert variance is not None and untouched is not None and torch.equal(variance, untouched)


@pytest.mark.parametrize('resolution', [2, 3, 24, 25])
def test_axes_are_symmetric_bit_for_bit(resolution: int) -> None:
    axis = grid_axis(-0.7, 0.7, resolution)
    assert np.array_equal(axis, -axis[::-1])
    assert (axis[0], axis[-1], len(axis)) == (-0.7, 0.7, resolution)


def test_a_subspace_is_abstract() -> None:
    with pytest.raises(NotImplementedError):
        Subspace((), ()).weights([])

"""Rounded weights are the nearest numbers of their groups, and noise is relative to every matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from composer_sam.diagnostics import noisy, quantized


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 12), nn.Linear(12, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def nearest(row: Tensor, bits: int) -> Tensor:
    """Of all numbers that an integer times the scale can be, the nearest to each weight, found by trying them."""
    most = 2 ** (bits - 1) - 1
    numbers = torch.arange(-most, most + 1) * (row.abs().max() / most)
    return numbers[(row[:, None] - numbers).abs().argmin(1)]


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('group', [1, 5, 12, 64])
def test_every_weight_is_the_nearest_number_of_its_group(bits: int, group: int) -> None:
    model = network()
    found = quantized(model, bits, group)
    assert set(found) == {'1.weight', '3.weight'}
    for name, rounded in found.items():
        weight = model.get_parameter(name).detach()
        for row, result in zip(weight, rounded, strict=True):
            expected = torch.cat([nearest(part, bits) for part in row.split(group)])
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-7)


def test_a_group_of_zeros_stays() -> None:
    layer = nn.Linear(4, 1)
    layer.weight.data = torch.tensor([[0.0, 0.0, 1.0, 0.3]])
    assert quantized(layer, 2, 2)['weight'].tolist() == [[0.0, 0.0, 1.0, 0.0]]


def test_the_layers_of_gpt_2_have_their_groups_along_the_inputs() -> None:
    layers = pytest.importorskip('transformers.pytorch_utils')
    torch.manual_seed(0)
    ours, theirs = nn.Linear(10, 6), layers.Conv1D(6, 10)
    theirs.weight.data = ours.weight.detach().T.clone()
    assert torch.equal(quantized(theirs, 4, 3)['weight'], quantized(ours, 4, 3)['weight'].T)


def test_a_matrix_that_is_shared_with_an_embedding_is_left_out() -> None:
    model = network()
    model.append(nn.Linear(12, 5, bias=False))
    model[4].weight = model[0].weight
    assert set(quantized(model, 4)) == set(noisy(model, 0.1, 0)) == {'1.weight', '3.weight'}


def test_noise_is_relative_to_its_matrix_and_repeats() -> None:
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 100))
    model.get_parameter('1.weight').data *= 100
    before = [p.detach().clone() for p in model.parameters()]
    found = noisy(model, 0.05, 1)
    for name, weight in found.items():
        original = model.get_parameter(name).detach()
        relative = (weight - original) / original.square().mean().sqrt()
        assert float(relative.std()) == pytest.approx(0.05, rel=0.03)
        assert abs(float(relative.mean())) < 0.002
    assert torch.equal(found['0.weight'], noisy(model, 0.05, 1)['0.weight'])
    assert not torch.equal(found['0.weight'], noisy(model, 0.05, 2)['0.weight'])
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_the_global_random_stream_is_not_moved() -> None:
    model = network()
    before = torch.get_rng_state()
    noisy(model, 0.1, 3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(('bits', 'group'), [(1, 4), (17, 4), (4.0, 4), (True, 4), (4, 0)])
def test_wrong_numbers_are_refused(bits: int, group: int) -> None:
    with pytest.raises(ValueError, match='bits must be|group must be'):
        quantized(network(), bits, group)


@pytest.mark.parametrize('size', [0, -0.1, float('nan'), '0.1'])
def test_wrong_sizes_are_refused(size: float) -> None:
    with pytest.raises(ValueError, match='size must be a finite number > 0'):
        noisy(network(), size, 0)

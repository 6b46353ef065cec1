"""Diagnostics on an accelerator: the CPU's numbers, and its random streams and kernels left as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from composer_sam.diagnostics import Objective, measure, spectral_density, top_eigenvalues

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]
cross_entropy = nn.functional.cross_entropy


class Recurrent(nn.Module):
    """Convolution, BatchNorm and a recurrent layer, whose cuDNN kernel cannot be differentiated in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.recurrent = nn.GRU(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.tanh(self.norm(self.conv(x)))
        return self.head(self.recurrent(features.transpose(1, 2))[0][:, -1])


def problem() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    return Recurrent().double(), [(torch.randn(9, 2, 6).double(), torch.randint(3, (9,))) for _ in range(3)]


def test_the_numbers_are_the_cpus() -> None:
    model, batches = problem()
    on_gpu = copy.deepcopy(model).cuda()
    v = Objective(model, cross_entropy, batches).gaussian(0)
    products = [Objective(net, cross_entropy, batches, microbatch=5).hessian_product(v) for net in (model, on_gpu)]
    for ours, expected in zip(products[1], products[0], strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-7, atol=1e-10)
    options = {'measures': ('loss', 'gradient_norm', 'top_eigenvalue', 'sam_sharpness'), 'tol': 1e-7}
    found, expected = (measure(net, cross_entropy, batches, **options) for net in (on_gpu, model))
    assert found.loss == pytest.approx(expected.loss, rel=1e-9)
    assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-6)
    assert found.top_eigenvalue == pytest.approx(expected.top_eigenvalue, rel=1e-6)
    assert found.sam_sharpness == pytest.approx(expected.sam_sharpness, rel=1e-6)
    assert spectral_density(on_gpu, cross_entropy, batches, steps=5, probes=1).nodes.max() > 0


def test_streams_and_settings_of_the_gpu_are_left_alone() -> None:
    model, batches = problem()
    model = model.float().cuda()
    torch.backends.cudnn.benchmark, before = True, torch.backends.cudnn.benchmark
    try:
        stream, weights = torch.cuda.get_rng_state(), copy.deepcopy(model.state_dict())
        batches = [(x.float(), y) for x, y in batches]
        a, b = (top_eigenvalues(model, cross_entropy, batches).values for _ in range(2))
        assert a == b
        assert torch.equal(stream, torch.cuda.get_rng_state())
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.enabled
    finally:
        torch.backends.cudnn.benchmark = before

"""What only an accelerator can show, for every method: skipped without one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from composer_sam import SGDHess, SharpnessAwareOptimizer, registry
from tests.problems import (
    BASES,
    EVERY_PASS,
    Closure,
    batches,
    convolutional,
    made,
    needs_graph,
    network,
    part,
    same,
    snapshot,
    with_all_passes,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]
METHODS = sorted(registry)


def on_gpu(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x.cuda(), y.cuda()) for x, y in batches(count, dtype)]


@pytest.mark.parametrize('name', METHODS)
def test_the_trajectory_is_the_cpus(name: str) -> None:
    ends = []
    for device in ('cpu', 'cuda'):
        model = convolutional().to(device)
        # The random signs of SGDHess come from the device's own generator.
        method = SGDHess(rho=1e-9) if name == 'SGDHess' else made(name)
        optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), method, model)
        for x, y in batches(10, torch.float64):
            optimizer.step(Closure(model, (x.to(device), y.to(device)), graph=needs_graph(name)))
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach().cpu())
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('name', METHODS)
def test_weights_come_back_bit_for_bit_at_the_same_address(name: str, dtype: torch.dtype) -> None:
    model = network(dtype).cuda()
    base = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    optimizer = SharpnessAwareOptimizer(base, with_all_passes(name), model)
    before = copy.deepcopy(list(model.parameters()))
    addresses: set[int] = set()
    first = part(model, '0', nn.Linear)
    first.register_forward_hook(lambda *_: addresses.add(first.weight.data_ptr()))
    for batch in on_gpu(16, dtype):
        optimizer.step(Closure(model, batch, graph=needs_graph(name)))
    assert same(before, list(model.parameters()))
    assert len(addresses) == 1  # a captured CUDA graph goes on reading the right memory


@pytest.mark.parametrize(('name', 'values', 'index'), EVERY_PASS)
def test_a_fault_in_any_pass_leaves_everything_as_it_was(name: str, values: dict[str, Any], index: int) -> None:
    model = network().cuda()
    optimizer = SharpnessAwareOptimizer(BASES['AdamW'](model.parameters()), made(name, **values), model)
    first, second = on_gpu(2)
    optimizer.step(Closure(model, first, graph=needs_graph(name)))
    before, stream = snapshot(model, optimizer), torch.cuda.get_rng_state()
    with pytest.raises(RuntimeError, match='out of memory'):
        optimizer.step(Closure(model, second, RuntimeError('out of memory'), index, graph=needs_graph(name)))
    assert same(before, snapshot(model, optimizer))
    assert torch.equal(stream, torch.cuda.get_rng_state())


@pytest.mark.parametrize('name', METHODS)
def test_every_pass_sees_the_same_dropout_mask_and_the_stream_goes_on_as_after_one(name: str) -> None:
    ends = []
    for sharp in (False, True):
        model = network(dropout=0.5).cuda()
        masks: list[torch.Tensor] = []
        model[3].register_forward_hook(lambda _, args, out, masks=masks: masks.append(out == 0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        if sharp:
            optimizer = SharpnessAwareOptimizer(optimizer, with_all_passes(name), model)
        torch.manual_seed(1)
        optimizer.step(Closure(model, on_gpu(1)[0], graph=needs_graph(name)))
        assert all(torch.equal(masks[0], mask) for mask in masks)
        ends.append((masks[0], torch.cuda.get_rng_state()))
    assert same(*ends)


@pytest.mark.parametrize('name', [name for name in METHODS if not needs_graph(name)])
def test_fp16_with_a_grad_scaler_follows_fp32_and_skips_an_overflow(name: str) -> None:
    ends = []
    for half in (False, True):
        model = convolutional(torch.float32).cuda()
        scaler = torch.amp.GradScaler('cuda', init_scale=2.0**10, growth_interval=10_000, enabled=half)
        optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), with_all_passes(name), model, scaler)

        def closure(
            batch: tuple[torch.Tensor, torch.Tensor], factor: float = 1.0, model: nn.Module = model,
            optimizer: SharpnessAwareOptimizer = optimizer, scaler: torch.amp.GradScaler = scaler, half: bool = half,
        ) -> torch.Tensor:  # fmt: skip
            optimizer.zero_grad()
            with torch.autocast('cuda', torch.float16, enabled=half):
                loss = factor * nn.functional.cross_entropy(model(batch[0]), batch[1])
            scaler.scale(loss).backward()
            return loss

        for batch in on_gpu(12):
            optimizer.step(lambda batch=batch, closure=closure: closure(batch))
            scaler.update()
        if half:
            before = snapshot(model, optimizer)
            optimizer.step(lambda batch=batch, closure=closure: closure(batch, factor=float('inf')))
            scaler.update()
            after = snapshot(model, optimizer)
            assert optimizer.skipped
            assert scaler.get_scale() == 2.0**9
            assert same(before['optimizer'], after['optimizer'])
            assert all(same(before['model'][n], after['model'][n]) for n, _ in model.named_parameters())
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*ends, rtol=0.05, atol=0.02)


def test_memory_of_a_differentiable_backward_is_flat() -> None:
    model = convolutional(torch.float32).cuda()
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SGDHess(), model)
    batch = on_gpu(1)[0]
    held = []
    for _ in range(200):
        optimizer.step(Closure(model, batch, graph=True))
        held.append(torch.cuda.memory_allocated())
    assert held[-1] == held[10]

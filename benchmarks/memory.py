"""Memory a sharpness-aware step holds between steps and adds at its peak, against Composer's own SAM.

On the CPU the profiler records every allocation and release of torch's allocator, temporaries inside operators
included, from before the model is made; on CUDA the caching allocator keeps the peak itself. Both are exact. A pass
here is a backward that allocates the gradients and nothing else, so the figures are the step's own.

    python -m benchmarks.memory
    python -m benchmarks.memory --methods SAM --device cuda
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from composer.algorithms.sam import SAMOptimizer
from torch import nn
from torch.optim import Optimizer

from benchmarks.report import Report, Table
from benchmarks.workloads import BASES, forced_placement, gradient_closure, measurable_methods
from composer_sam import SharpnessAwareOptimizer, registry

__all__ = ['COLUMNS', 'memory_rows']

COLUMNS = ('model', 'base', 'variant', 'held between steps', 'at the peak', 'stated by the method')
NOTE = 'In copies of the parameters, beyond the base optimizer with the same closure.'
_STEPS = 3


def memory_rows(
    model: str, base: str, methods: Sequence[str], placements: Sequence[str], device: torch.device
) -> list[tuple[Any, ...]]:
    """The rows of the report for one model and one base optimizer."""

    def ours(method: str, placement: str) -> Callable[[Optimizer, nn.Module], Callable[[Any], object]]:
        def wrap(optimizer: Optimizer, net: nn.Module) -> Callable[[Any], object]:
            wrapped = SharpnessAwareOptimizer(optimizer, registry[method](), net)

            def step(closure: Any) -> None:
                with forced_placement(placement):
                    wrapped.step(closure)

            return step

        return wrap

    held, peak, copy = _measured(model, base, lambda optimizer, _: optimizer.step, device)
    rows: list[tuple[Any, ...]] = []
    variants: dict[str, tuple[Any, Any]] = {"Composer's SAM": (lambda opt, _: SAMOptimizer(opt, rho=0.05).step, '')}
    for method in methods:
        for placement in placements:
            label = method if placement == 'default' else f'{method}, {placement}'
            variants[label] = ours(method, placement), registry[method].extra_copies
    for label, (wrap, stated) in variants.items():
        own_held, own_peak, _ = _measured(model, base, wrap, device)
        rows.append((model, base, label, (own_held - held) / copy, (own_peak - peak) / copy, stated))
    return rows


def _measured(model: str, base: str, wrap: Any, device: torch.device) -> tuple[int, int, int]:
    """Bytes held after a step, bytes at its peak, and the parameters' bytes."""
    gc.collect()

    def run(mark: Callable[[str], Any]) -> int:
        with mark('build'):
            net = torchvision.models.get_model(model, weights=None).to(device)
            parameters = list(net.parameters())
            optimizer = BASES[base](parameters)
            closure = gradient_closure(parameters, optimizer)
            step = wrap(optimizer, net)
        for index in range(_STEPS):
            with mark(f'step {index}'):
                step(closure)
            with mark(f'between {index}'):
                optimizer.zero_grad(set_to_none=True)
        return sum(p.numel() * p.element_size() for p in parameters)

    if device.type == 'cuda':
        return _on_cuda(run, device)
    return _on_cpu(run)


def _on_cuda(run: Callable[[Callable[[str], Any]], int], device: torch.device) -> tuple[int, int, int]:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    held, peak = [], []

    class Mark:
        def __init__(self, name: str):
            self.name = name

        def __enter__(self) -> None:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)

        def __exit__(self, *exception: object) -> None:
            torch.cuda.synchronize(device)
            if self.name.startswith('step'):
                peak.append(torch.cuda.max_memory_allocated(device) - before)
            elif self.name.startswith('between'):
                held.append(torch.cuda.memory_allocated(device) - before)

    copy = run(Mark)
    gc.collect()
    return held[-1], peak[-1], copy


def _on_cpu(run: Callable[[Callable[[str], Any]], int]) -> tuple[int, int, int]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        copy = run(torch.profiler.record_function)
    recorded: Any = profile.profiler
    events = recorded.kineto_results.events()
    spans = {e.name(): (e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() in _marks()}
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == '[memory]')
    held = peak = total = 0
    begin, end = spans[f'step {_STEPS - 1}']
    between = spans[f'between {_STEPS - 1}'][1]
    for time, nbytes in changes:
        if time > between:
            break
        total += nbytes
        if begin <= time <= end:
            peak = max(peak, total)
        held = total
    return held, peak, copy


def _marks() -> set[str]:
    return {f'{name} {index}' for name in ('step', 'between') for index in range(_STEPS)}


def main() -> None:
    measurable = measurable_methods()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet18', 'vit_b_16'], help='names of torchvision models')
    parser.add_argument('--methods', nargs='+', default=measurable, choices=measurable)
    parser.add_argument('--base', nargs='+', default=['SGD'], choices=sorted(BASES))
    parser.add_argument('--placements', nargs='+', default=['default', 'copy'], choices=['default', 'copy', 'exchange'])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--json', metavar='OUT', help='write the report here instead of benchmarks/results/')
    options = parser.parse_args()

    report = Report('memory', vars(options), options.json)
    table = Table('Memory beyond the base optimizer', COLUMNS, note=NOTE)
    for model in options.models:
        for base in options.base:
            for row in memory_rows(model, base, options.methods, options.placements, torch.device(options.device)):
                table.add(*row)
    report.add(table)
    report.write()


if __name__ == '__main__':
    main()

"""Memory held between sharpness-aware steps and added at their peak, for every method and other packages' wrappers.

On the CPU the profiler records every allocation and release of torch's allocator, temporaries inside operators
included, from before the model is made; on CUDA the caching allocator keeps the peak itself. Both are exact. A pass
here is a backward that allocates the gradients and nothing else, so the figures are the step's own. What each rule
needs is derived in ``benchmarks/optimizer_variants.py``.

    python -m benchmarks.memory
    python -m benchmarks.memory --models resnet18 --base SGD --placements default copy
    python -m benchmarks.memory --methods SAM --device cuda
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision

from benchmarks.optimizer_variants import (
    COMPOSER,
    METHODS,
    NEEDS,
    PEERS,
    MakeClosure,
    Wrap,
    available_peers,
    closure_of,
    curved_closure,
    hessian_by_hand,
    ours,
    passes_by_hand,
    plain_closure,
)
from benchmarks.report import Report, Table
from benchmarks.workloads import BASES

__all__ = ['COLUMNS', 'NOTE', 'memory_rows']

COLUMNS = ('model', 'base', 'variant', 'held between steps', 'at the peak', 'stated', 'needed by the rule')
NOTE = (
    'In copies of the parameters, beyond the base optimizer with the same closure. Stated: by the method, an upper '
    'bound (extra_copies). Needed by the rule: at the peak, with the least we know a way for. A method that '
    "differentiates twice is measured beyond a base step whose backward keeps its graph; 'beyond its double backward': "
    "beyond one that also takes the Hessian's product with a vector, two copies, and drops it. Where steps differ, one "
    "with all passes is measured, and for 'one pass' one of the others. FunctionalSAM also keeps the gradient at the "
    "model's outputs, one number here, whose size goes with the batch."
)
_STEPS = 2  # the first makes the base optimizer's state and the peers' own


def memory_rows(
    model: str,
    base: str,
    methods: Sequence[str],
    placements: Sequence[str],
    device: torch.device,
    peers: Sequence[str] = (COMPOSER,),
) -> list[tuple[Any, ...]]:
    """Return the rows of the report for one model and one base optimizer."""
    floors: dict[tuple[Wrap, MakeClosure], tuple[int, int, int]] = {}
    rows: list[tuple[Any, ...]] = []

    def add(
        label: str, wrap: Wrap, stated: Any, needed: Any, floor: Wrap, make_closure: MakeClosure = plain_closure
    ) -> None:
        if (key := (floor, make_closure)) not in floors:
            floors[key] = _measured(model, base, floor, device, make_closure)
        held, peak, copy = floors[key]
        own_held, own_peak, _ = _measured(model, base, wrap, device, make_closure)
        rows.append((model, base, label, (own_held - held) / copy, (own_peak - peak) / copy, stated, needed))

    plain = passes_by_hand(1)
    for name in peers:
        add(name, PEERS[name].wrap, '', NEEDS[PEERS[name].rule].copies, plain)
    for method in methods:
        needed = NEEDS[method].copies if method in NEEDS else ''
        stated, closure = METHODS[method]().extra_copies, closure_of(method)
        for placement in placements:
            label = method if placement == 'default' else f'{method}, {placement}'
            add(label, ours(method, placement), stated, needed, plain, closure)
            if closure is curved_closure:
                add(f'{label}, beyond its double backward', ours(method, placement), '', 0, hessian_by_hand, closure)
    return rows


def _measured(
    model: str, base: str, wrap: Wrap, device: torch.device, make_closure: MakeClosure
) -> tuple[int, int, int]:
    """Return the bytes held after a step, the bytes at its peak, and the bytes of the parameters."""
    gc.collect()

    def run(mark: Callable[[str], Any]) -> int:
        with mark('build'):
            with torch.device('meta'):
                net = torchvision.models.get_model(model, weights=None)
            net.to_empty(device=device)  # what the weights are makes no difference, and drawing them takes seconds
            for tensor in (*net.parameters(), *net.buffers()):
                tensor.detach().fill_(1)
            parameters = list(net.parameters())
            idle = BASES[base](parameters)  # for the closure, which zeroes gradients
            closure = make_closure(net, idle)
            step = wrap(net, BASES[base])
        for index in range(_STEPS):
            with mark(f'step {index}'):
                step(closure)
            with mark(f'between {index}'):
                net.zero_grad(set_to_none=True)
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
    # Not torch.profiler.profile: it reads all events into Python objects, which takes longer than the steps.
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        copy = run(torch.profiler.record_function)
    recorded: Any = profile
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet18', 'vit_b_16'], help='names of torchvision models')
    parser.add_argument('--methods', nargs='+', default=list(METHODS), choices=list(METHODS))
    parser.add_argument('--base', nargs='+', default=['SGD', 'AdamW'], choices=sorted(BASES))
    parser.add_argument('--placements', nargs='+', default=['default'], choices=['default', 'copy', 'exchange'])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--json', metavar='OUT', help='write the report here instead of benchmarks/results/')
    options = parser.parse_args()
    device = torch.device(options.device)

    report = Report('memory', vars(options), options.json)
    table = Table('Memory beyond the base optimizer', COLUMNS, note=NOTE)
    for model in options.models:
        for base in options.base:
            settings = (model, base, options.methods, options.placements, device, available_peers())
            for row in report.case(f'{model}, {base}', functools.partial(memory_rows, *settings)):
                table.add(*row)
    report.add(table)
    report.write()


if __name__ == '__main__':
    main()

"""Time of a sharpness-aware step beyond its passes and the base step, against Composer's own SAM.

The floor is what no implementation can avoid: as many passes as the method asks for, then ``base.step()``. A pass here
is a real backward that allocates every gradient anew, as autograd does, and costs nothing else. All variants run
interleaved in one process, each on a model of its own; what counts is the median of the differences to the floor of
the same round.

    python -m benchmarks.optimizer_overhead
    python -m benchmarks.optimizer_overhead --models resnet18 --base AdamW --breakdown
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torchvision
from composer.algorithms.sam import SAMOptimizer
from torch import nn

from benchmarks.measure import Samples, interleaved, median, spread
from benchmarks.report import Report, Table
from benchmarks.workloads import BASES, forced_placement, gradient_closure, measurable_methods
from composer_sam import SharpnessAwareOptimizer, registry
from composer_sam.controls import BufferControl, RandomControl
from composer_sam.placement import Placement
from composer_sam.step import Step

__all__ = ['COLUMNS', 'overhead_rows']

COLUMNS = (
    'model',
    'base',
    'variant',
    'step ms',
    '±',
    'beyond floor ms',
    '±',
    'host ms',
    'page faults',
    'x copy of the parameters',
    "x Composer's SAM",
)
NOTE = (
    'Floor: the passes and base.step(). Beyond floor: median over rounds of the difference to the floor of the same '
    'round; ± is half the interquartile range. x copy: in units of one copy of the parameters into memory that is '
    'there. Host: until the call returned, the device not drained.'
)
Variants = dict[str, Callable[[], object]]


def overhead_rows(
    model: str,
    base: str,
    methods: Sequence[str],
    placements: Sequence[str],
    device: torch.device,
    rounds: int,
) -> list[tuple[Any, ...]]:
    """The rows of the report for one model and one base optimizer."""
    passes = {name: registry[name]().passes for name in methods}
    variants: Variants = {
        f'floor, {count} passes': _floor(model, base, count, device) for count in {2, *passes.values()}
    }
    variants['copy'] = _copy(model, device)
    variants["Composer's SAM"] = _composer(model, base, device)
    floors = {"Composer's SAM": 'floor, 2 passes'}
    for name in methods:
        for placement in placements:
            label = name if placement == 'default' else f'{name}, {placement}'
            variants[label] = _ours(model, base, name, placement, device)
            floors[label] = f'floor, {passes[name]} passes'
    samples = interleaved(variants, rounds, device)
    composer = samples["Composer's SAM"].beyond(samples[floors["Composer's SAM"]])
    copied = median(samples.pop('copy').seconds)
    return [
        (model, base, name, *_figures(own, samples.get(floors.get(name, '')), copied, median(composer)))
        for name, own in samples.items()
    ]


def _figures(own: Samples, floor: Samples | None, copied: float, composer: float) -> tuple[Any, ...]:
    step = (1e3 * median(own.seconds), 1e3 * spread(own.seconds))
    host, faults = 1e3 * median(own.host), int(median(own.faults))
    if floor is None:
        return *step, '', '', host, faults, '', ''
    beyond = own.beyond(floor)
    cost = median(beyond)
    return *step, 1e3 * cost, 1e3 * spread(beyond), host, faults, cost / copied, cost / composer


def _built(
    model: str, base: str, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, Sequence[torch.Tensor]]:
    torch.manual_seed(0)
    net = torchvision.models.get_model(model, weights=None).to(device)
    parameters = list(net.parameters())
    return net, BASES[base](parameters), parameters


def _floor(model: str, base: str, passes: int, device: torch.device) -> Callable[[], object]:
    _, optimizer, parameters = _built(model, base, device)
    closure = gradient_closure(parameters, optimizer)

    def step() -> None:
        for _ in range(passes):
            closure()
        optimizer.step()

    return step


def _copy(model: str, device: torch.device) -> Callable[[], object]:
    parameters = [p.detach() for p in torchvision.models.get_model(model, weights=None).to(device).parameters()]
    copies = [torch.zeros_like(p) for p in parameters]
    return lambda: torch._foreach_copy_(copies, parameters)


def _composer(model: str, base: str, device: torch.device) -> Callable[[], object]:
    _, optimizer, parameters = _built(model, base, device)
    wrapped = SAMOptimizer(optimizer, rho=0.05)
    closure = gradient_closure(parameters, wrapped)
    return lambda: wrapped.step(closure)


def _ours(model: str, base: str, method: str, placement: str, device: torch.device) -> Callable[[], object]:
    net, optimizer, parameters = _built(model, base, device)
    wrapped = SharpnessAwareOptimizer(optimizer, registry[method](), net)
    closure = gradient_closure(parameters, wrapped)

    def step() -> None:
        with forced_placement(placement):
            wrapped.step(closure)

    return step


@contextmanager
def _timed(spent: dict[str, float]) -> Iterator[None]:
    """Add up the time inside the engine's parts, a part's time inside another one not counted twice."""
    parts: list[tuple[Any, str, str]] = [
        (Step, '__init__', 'making the step'),
        (Step, '_advance', "the method's mathematics"),
        (Step, '_take_gradient', 'taking the gradients'),
        (Step, 'write_direction', 'handing over the direction'),
        (Placement, 'place', 'placing w + e'),
        (Placement, 'restore', 'restoring w'),
        *((RandomControl, name, 'random streams') for name in ('__init__', 'first_pass_done', 'rewind', 'settle')),
        *((BufferControl, name, 'module buffers') for name in ('__init__', 'first_pass_done', 'rewind', 'settle')),
    ]
    originals = [getattr(owner, name) for owner, name, _ in parts]
    inner = [0.0]

    def timing(function: Any, part: str) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - begin
                spent[part] += elapsed - inner.pop()
                inner[-1] += elapsed

        return timed

    for (owner, name, part), original in zip(parts, originals, strict=True):
        setattr(owner, name, timing(original, part))
    try:
        yield
    finally:
        for (owner, name, _), original in zip(parts, originals, strict=True):
            setattr(owner, name, original)


def _breakdown(model: str, base: str, method: str, placement: str, device: torch.device, rounds: int) -> list[Any]:
    step = _ours(model, base, method, placement, device)
    step()
    collected: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        spent: dict[str, float] = defaultdict(float)
        with _timed(spent):
            step()
        for part, seconds in spent.items():
            collected[part].append(seconds)
    return [(model, base, method, placement, part, 1e3 * median(own)) for part, own in collected.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet18', 'vit_b_16'], help='names of torchvision models')
    parser.add_argument('--methods', nargs='+', default=['SAM'], choices=measurable_methods())
    parser.add_argument('--base', nargs='+', default=['SGD'], choices=sorted(BASES))
    parser.add_argument('--placements', nargs='+', default=['default', 'copy'], choices=['default', 'copy', 'exchange'])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--repeats', type=int, default=30)
    parser.add_argument('--breakdown', action='store_true', help='also show where the time goes inside the engine')
    parser.add_argument('--json', metavar='OUT', help='write the report here instead of benchmarks/results/')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)

    report = Report('optimizer_overhead', vars(options), options.json)
    table = Table('Optimizer-side cost of a step', COLUMNS, note=NOTE)
    for model in options.models:
        for base in options.base:
            for row in overhead_rows(model, base, options.methods, options.placements, device, options.repeats):
                table.add(*row)
    report.add(table)
    if options.breakdown:
        parts = Table('Where the time goes', ('model', 'base', 'method', 'placement', 'part', 'ms'))
        for model in options.models:
            for base in options.base:
                for method in options.methods:
                    for placement in options.placements:
                        for row in _breakdown(model, base, method, placement, device, options.repeats):
                            parts.add(*row)
        report.add(parts)
    report.write()


if __name__ == '__main__':
    main()

"""Time of a sharpness-aware step beyond its passes and the base step: by number and size of tensors, and on models.

Every method of ours and other packages' wrappers of the same rules, against two floors measured in the same rounds:

- *passes by hand*: as many passes as the method asks for, or its double backward, then ``base.step()``. A pass is a
  real backward that allocates every gradient anew, as autograd does, and costs nothing else. What counts is the median
  of the differences to this floor in the same round.
- *memory*: the reads and writes a rule cannot do without (derived in ``benchmarks/optimizer_variants.py``) at the
  bandwidth that a multi-tensor copy or add of the same tensors attained.

A case is measured in a process of its own, its variants interleaved, all on the same parameters and the same state of
the base optimizer: weights come back, every pass has the same gradient, and lr is 1e-6. Freed memory matters: the C
library gives some of it back to the system, which then has to supply it again, a page fault for every 4 KiB. So the
models are measured twice, with its ``default`` settings and with ones under which it ``keeps`` what was freed
(MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ at 4000000000); the synthetic tensors only with the latter.

    python -m benchmarks.optimizer_overhead
    python -m benchmarks.optimizer_overhead --sizes 100x1e6 --models
    python -m benchmarks.optimizer_overhead --sizes --models resnet18 --methods SAM --base AdamW --breakdown
"""

from __future__ import annotations

import argparse
import functools
import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torchvision
from torch import nn
from torch.optim import Optimizer

from benchmarks.allocator import ALLOCATORS, apart
from benchmarks.measure import interleaved, median, spread
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
    watched_closure,
)
from benchmarks.report import Report, Table
from benchmarks.workloads import BASES
from composer_sam.engine.attributes import AttributeControl
from composer_sam.engine.controls import BufferControl, RandomControl
from composer_sam.engine.placement import Placement
from composer_sam.engine.transaction import Transaction

__all__ = ['COLUMNS', 'NOTE', 'overhead_rows', 'torchvision_model']

COLUMNS = (
    'base',
    'variant',
    'rounds',
    'µs per step',
    'µs beyond the passes',
    '±',
    'reads and writes',
    'µs memory floor',
    'x memory floor',
    'GB/s',
    "x Composer's SAM",
    'x fastest peer',
    'host µs',
    'page faults',
)
NOTE = (
    'Beyond the passes: median over rounds of the difference to the floor of the same round; ± is half the '
    'interquartile range. Reads and writes: how often the rule has to touch an element for every parameter beyond its '
    'passes and the base step; memory floor: as many at the bandwidth of the multi-tensor copy or add, whichever was '
    "faster. Fastest peer: another package's wrapper of the same rule; ASAM has none (pytorch_optimizer's adaptive SAM "
    'takes |w| for every tensor, without eta). Host: until the call returned, the device not drained. Where steps '
    "differ, those with all passes are measured, and for 'one pass' the others. FunctionalSAM needs outputs to watch: "
    'in its passes, and in those of its floor, one number takes their place.'
)
SIZES = (
    *('10x1e4', '10x1e6', '10x1e7'),
    *('100x1e4', '100x1e6', '100x1e7', '100x1e8'),
    *('500x1e6', '500x1e7'),
    *('2000x1e4', '2000x1e6', '2000x1e7'),
)
_FEWEST = 7
_COPY, _ADD = 'multi-tensor copy', 'multi-tensor add'
_MOVED = {_COPY: 2, _ADD: 3}  # reads and writes


def overhead_rows(
    net: nn.Module,
    base: str,
    methods: Sequence[str],
    placements: Sequence[str],
    device: torch.device,
    rounds: int,
    seconds: float = float('inf'),
    peers: Sequence[str] = (COMPOSER,),
) -> list[tuple[Any, ...]]:
    """The rows of the report for one module and one base optimizer, from as many ``rounds``, or from fewer, but at
    least 7, where they would take longer than ``seconds``."""
    steps, floors, rules = _variants(net, base, methods, placements, peers)
    tried = interleaved(steps, 1, device, warmup=1)
    lasts = sum(own.seconds[0] for own in tried.values())
    rounds = min(rounds, max(_FEWEST, int(min(rounds, seconds / lasts))))
    samples = interleaved(steps, rounds, device, warmup=0)

    nbytes = sum(p.numel() * p.element_size() for p in net.parameters())
    touch = min(median(samples[name].seconds) / count for name, count in _MOVED.items())  # of every parameter, once
    beyond = {label: samples[label].beyond(samples[floor]) for label, floor in floors.items()}
    cost = {label: median(own) for label, own in beyond.items()}

    def row(label: str) -> tuple[Any, ...]:
        own, rule = samples[label], rules.get(label, label)
        count = _MOVED.get(rule) or (NEEDS[rule].accesses_with(base) if rule in NEEDS else None)
        figures: list[Any] = [1e6 * median(own.seconds)]
        figures += [1e6 * cost[label], 1e6 * spread(beyond[label])] if label in floors else ['', '']
        if count is None:
            figures += ['', '', '', '']
        else:
            took = cost.get(label, median(own.seconds))
            figures += [count, 1e6 * count * touch, took / (count * touch), 1e-9 * count * nbytes / took]
        figures.append(cost[label] / cost[COMPOSER] if label in floors and COMPOSER in cost else '')
        rivals = [cost[peer] for peer in peers if PEERS[peer].rule == rule]
        figures.append(cost[label] / min(rivals) if rivals and label not in peers else '')
        return base, label, rounds, *figures, 1e6 * median(own.host), int(median(own.faults))

    return [row(label) for label in samples]


def _variants(
    net: nn.Module, base: str, methods: Sequence[str], placements: Sequence[str], peers: Sequence[str]
) -> tuple[dict[str, Callable[[], object]], dict[str, str], dict[str, str]]:
    """Return the step of every variant by its name, and the names of its floor and its rule if it has them."""
    parameters = list(net.parameters())
    first = BASES[base](parameters)
    plain = plain_closure(net, first)
    plain()
    first.step()
    closures: dict[MakeClosure, Callable[..., Any]] = {plain_closure: plain}

    def make_base(groups: Any, **options: Any) -> Optimizer:
        """Return a base optimizer that shares the state of the first, so that memory and caches are equal."""
        optimizer = BASES[base](groups, **options)
        for parameter in parameters:
            optimizer.state[parameter].update(first.state[parameter])
        return optimizer

    steps: dict[str, Callable[[], object]] = {}
    floors: dict[str, str] = {}
    rules: dict[str, str] = {}

    def add(label: str, wrap: Wrap, closure: Any = plain) -> None:
        steps[label] = functools.partial(wrap(net, make_base), closure)

    targets = [torch.zeros_like(p, requires_grad=False) for p in parameters]
    sources = [p.detach() for p in parameters]
    steps[_COPY] = lambda: torch._foreach_copy_(targets, sources)
    steps[_ADD] = lambda: torch._foreach_add_(targets, sources)

    def floor_of(name: str) -> str:
        """Return the name of a method's floor, which is added if there is none yet."""
        make_closure = closure_of(name)
        count = METHODS[name]().fewest_passes  # all its steps take as many
        watched = ', watched' if make_closure is watched_closure else ''
        label = 'floor, double backward' if make_closure is curved_closure else f'floor, {count} passes{watched}'
        if make_closure not in closures:
            closures[make_closure] = make_closure(net, first)
        if label not in steps:
            hand = hessian_by_hand if make_closure is curved_closure else passes_by_hand(count)
            add(label, hand, closures[make_closure])
        return label

    add('floor, 2 passes', passes_by_hand(2))
    for name in methods:
        floor_of(name)
    for name in peers:
        add(name, PEERS[name].wrap)
        floors[name], rules[name] = 'floor, 2 passes', PEERS[name].rule
    for name in methods:
        for placement in placements:
            label = name if placement == 'default' else f'{name}, {placement}'
            floors[label], rules[label] = floor_of(name), name
            add(label, ours(name, placement), closures[closure_of(name)])
    return steps, floors, rules


class _Tensors(nn.Module):
    """Return a module of equal tensors; their names make ASAM scale every one."""

    def __init__(self, tensors: int, parameters: int):
        super().__init__()
        for index in range(tensors):
            self.register_parameter(f'weight{index}', nn.Parameter(torch.randn(parameters // tensors)))


def torchvision_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None)


def _size(text: str) -> tuple[int, int]:
    tensors, parameters = (int(float(part)) for part in text.split('x'))
    if not 0 < tensors <= parameters:
        raise argparse.ArgumentTypeError(f'{text}: TENSORSxPARAMETERS, at least one parameter in each tensor')
    return tensors, parameters


def _measured(case: str | tuple[int, int], base: str, settings: argparse.Namespace) -> list[tuple[Any, ...]]:
    """Measure one case in this process."""
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    net = (torchvision_model(case) if isinstance(case, str) else _Tensors(*case)).to(device)
    placements = settings.placements if isinstance(case, str) else ['default']
    limits = (settings.rounds, settings.seconds)
    return overhead_rows(net, base, settings.methods, placements, device, *limits, available_peers())


def _broken_down(case: str, base: str, settings: argparse.Namespace) -> list[tuple[Any, ...]]:
    """Median time inside each of the engine's functions, a part's time inside another one not counted twice; the
    parts that make up at least one percent."""
    torch.set_num_threads(settings.threads)
    net = torchvision_model(case).to(settings.device)
    parameters = list(net.parameters())
    rows = []
    for method in settings.methods:
        idle = BASES[base](parameters)
        closure = closure_of(method)(net, idle)
        step = ours(method)(net, BASES[base])
        step(closure)
        collected: dict[str, list[float]] = defaultdict(list)
        for _ in range(min(settings.rounds, 20)):
            with _timed(spent := defaultdict(float)):
                step(closure)
            for part, seconds in spent.items():
                collected[part].append(seconds)
        parts = sorted(((median(own), part) for part, own in collected.items()), reverse=True)
        least = sum(seconds for seconds, _ in parts) / 100
        rows += [(case, base, method, part, 1e6 * seconds) for seconds, part in parts if seconds >= least]
    return rows


@contextmanager
def _timed(spent: dict[str, float]) -> Iterator[None]:
    """Add up the time inside every function of the engine's classes; generators are left out, as others run in them."""
    inner = [0.0]

    def timing(function: Any, part: str) -> Any:
        @functools.wraps(function)
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

    originals = [
        (owner, name, function)
        for owner in (Transaction, Placement, RandomControl, BufferControl, AttributeControl)
        for name, function in vars(owner).items()
        if inspect.isfunction(function) and not inspect.isgeneratorfunction(function)
    ]
    for owner, name, function in originals:
        setattr(owner, name, timing(function, f'{owner.__name__}.{name}'))
    try:
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--sizes', nargs='*', default=[_size(size) for size in SIZES], type=_size, metavar='TENSORSxPARAMETERS'
    )
    parser.add_argument('--models', nargs='*', default=['resnet18', 'vit_b_16'], help='names of torchvision models')
    parser.add_argument('--methods', nargs='+', default=list(METHODS), choices=list(METHODS))
    parser.add_argument('--base', nargs='+', default=['SGD'], choices=sorted(BASES))
    parser.add_argument('--placements', nargs='+', default=['default'], choices=['default', 'copy', 'exchange'])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--rounds', type=int, default=100, help='at most, of each case')
    parser.add_argument('--seconds', type=float, default=8, help='after which a case ends that has had 7 rounds')
    parser.add_argument('--breakdown', action='store_true', help='also show where the time goes inside the engine')
    parser.add_argument('--json', metavar='OUT', help='write the report here instead of benchmarks/results/')
    options = parser.parse_args()

    report = Report('optimizer_overhead', vars(options), options.json)
    sizes = Table('By number of tensors and of parameters', ('tensors', 'parameters', *COLUMNS), note=NOTE)
    models = Table('Models', ('model', 'allocator', *COLUMNS), note=NOTE)
    parts = Table('Where the time goes', ('model', 'base', 'method', 'part', 'µs'))
    for base in options.base:
        for tensors, parameters in options.sizes:
            measure = functools.partial(apart, 'keeps', _measured, (tensors, parameters), base, options)
            for row in report.case(f'{tensors} tensors, {parameters:.0e} parameters, {base}', measure):
                sizes.add(tensors, parameters, *row)
        for model in options.models:
            for allocator in ALLOCATORS:
                measure = functools.partial(apart, allocator, _measured, model, base, options)
                for row in report.case(f'{model}, {allocator}, {base}', measure):
                    models.add(model, allocator, *row)
            if options.breakdown:
                for row in apart('keeps', _broken_down, model, base, options):
                    parts.add(*row)
    for table in (sizes, models, parts):
        if table.rows:
            report.add(table)
    report.write()


if __name__ == '__main__':
    main()

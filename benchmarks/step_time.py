"""Time of whole steps: of the base optimizer, of our methods, and of other packages' SAMs.

Through Composer's Trainer, and in a plain loop without it:

- ``trainer``: one process.
- ``compile``: the same with one thread, the model compiled by the Trainer with torch.compile's defaults. (With two
  threads torch 2.7's Inductor writes C++ for BatchNorm that does not compile.)
- ``ddp``: two processes of one thread each under DistributedDataParallel on gloo, each with half of every batch.
- ``plain``: one process, a plain loop, compared with pytorch_optimizer.
- ``default``: as ``trainer``, with the default settings of the C library; in all others it keeps freed memory (see
  allocator.py).

All variants of a model and a setting take their steps in turn in the same processes, in an order drawn anew every
round, and a step is compared with the base step of its own round. With an interval of k what is compared is every
stretch of k consecutive steps, in each of which one perturbs. A Trainer's step is timed from BATCH_START to BATCH_END:
loading is not part of it, the Trainer's own work is.

    python -m benchmarks.step_time
    python -m benchmarks.step_time --models mlp vit --settings trainer ddp --rounds 2
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch._dynamo.config
import torch.distributed as dist
from torch import nn
from torch._inductor.utils import fresh_inductor_cache

from benchmarks.allocator import apart
from benchmarks.measure import median, ratios, spread
from benchmarks.ranks import on_ranks
from benchmarks.report import Report, Table
from benchmarks.step_variants import Run, Variant, plain_variants, trainer_variants
from benchmarks.workloads import Batches, cifar_resnet18, digits_batches, digits_mlp, small_vit

CPU = torch.device('cpu')
INTERVALS = (1, 2, 5, 10)
SETTINGS = ('trainer', 'compile', 'ddp', 'plain', 'default')
RANKS = 2
COLUMNS = ('model', 'setting', 'variant', 'ms per step', '± ms', 'x base', '± x', 'limit', 'over the limit')


@dataclass(frozen=True)
class Model:
    """A network, its batches, and in every setting the rounds and the intervals of SAM that are measured."""

    build: Callable[[], nn.Module]
    batches: Callable[[], Batches]
    plan: Mapping[str, tuple[int, Sequence[int]]]


def of_images(build: Callable[[], nn.Module], rounds: int) -> Model:
    """A round takes seconds: where intervals are left out it is to bound the time of a run."""
    few = (10, (1, 10))
    plan = {'trainer': (rounds, INTERVALS), 'compile': few, 'ddp': few, 'plain': (10, ()), 'default': (10, (1,))}
    return Model(build, lambda: Batches(32, 8, (3, 32, 32), CPU), plan)


_EVERY = (150, INTERVALS)
MODELS = {
    'mlp': Model(
        digits_mlp,
        lambda: digits_batches(64, 8),
        {'trainer': _EVERY, 'compile': _EVERY, 'ddp': _EVERY, 'plain': (300, ()), 'default': (150, (1,))},
    ),
    'vit': of_images(small_vit, 14),
    'resnet18': of_images(cifar_resnet18, 16),
}


def measured(variants: dict[str, Variant], rounds: int) -> list[list[Any]]:
    """Return for every variant its name and its figures, or why it does not run."""
    runs: dict[str, Run] = {}
    reasons: dict[str, str] = {}
    for name, variant in variants.items():
        try:
            run = variant.start()
            for _ in range(max(2, variant.interval)):
                run.step()
        except Exception as error:
            reasons[name] = f'does not run: {type(error).__name__}: {str(error)[:200]}'
        else:
            run.seconds.clear()
            run.outside.clear()
            runs[name] = run
    # The networks of all variants live here: a collection must not charge them to the step it happens to fall into.
    gc.collect()
    gc.freeze()
    order = random.Random(0)  # the same on all ranks
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            runs[name].step()
    gc.unfreeze()
    return [
        [name, *(_figures(variant, name, runs) if name in runs else [None] * 8), reasons.get(name, '')]
        for name, variant in variants.items()
    ]


def _figures(variant: Variant, name: str, runs: dict[str, Run]) -> list[Any]:
    k = variant.interval
    own, base = _stretches(runs[name].seconds, k), _stretches(runs['base'].seconds, k)
    of_base = ratios(own, base)
    limit = 1 + (variant.passes - 1) / k
    against = median(ratios(own, _stretches(runs[variant.peer].seconds, k))) if variant.peer in runs else None
    outside = median(ratios(_stretches(runs[name].outside, k), base)) if runs[name].outside else None
    ms = [1e3 * seconds for seconds in own]
    over = median(of_base) - limit
    return [median(ms), spread(ms), median(of_base), spread(of_base), limit, over, against, outside]


def _stretches(seconds: Sequence[float], k: int) -> list[float]:
    return [fmean(seconds[i : i + k]) for i in range(len(seconds) - k + 1)]


def rows(name: str, setting: str, intervals: Sequence[int], rounds: float, threads: int) -> list[list[Any]]:
    """Return the rows of one model in one setting."""
    torch.set_num_threads(threads)
    model = MODELS[name]
    planned, of_plan = model.plan[setting]
    intervals = [k for k in intervals if k in of_plan]
    count = max(round(rounds * planned), 1 + max(intervals, default=1))  # at least two stretches of every interval
    if setting == 'plain':
        return measured(plain_variants(model.build, model.batches()), count)
    if setting in ('trainer', 'default'):
        return measured(trainer_variants(model.build, intervals, model.batches()), count)
    if setting == 'compile':
        torch._dynamo.reset()
        # One code serves the networks of all variants. What would not be compiled any more is an error, not slower.
        dynamo = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
        torch.set_num_threads(1)
        # Inductor's cache on disk hands out code made for another number of threads.
        with dynamo, fresh_inductor_cache():
            return measured(trainer_variants(model.build, intervals, model.batches(), compile_config={}), count)
    return on_ranks(RANKS, _on_rank, name, intervals, count, patience=120)


def _on_rank(name: str, intervals: Sequence[int], rounds: int) -> list[list[Any]]:
    model, rank = MODELS[name], dist.get_rank()
    batches = model.batches()
    batches[:] = [(x.chunk(RANKS)[rank], y.chunk(RANKS)[rank]) for x, y in batches]
    batches.batch_size //= RANKS
    return measured(trainer_variants(model.build, intervals, batches), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=list(MODELS), choices=list(MODELS))
    parser.add_argument('--settings', nargs='+', default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument('--intervals', nargs='+', type=int, default=list(INTERVALS), choices=INTERVALS)
    parser.add_argument('--rounds', type=float, default=1.0, help="times the model's own number of rounds")
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='of one process')
    parser.add_argument('--json', metavar='OUT', help='write the report here instead of benchmarks/results/')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    report = Report('step_time', vars(options), options.json)
    note = (
        'Medians; ± is half the interquartile range. Ratios are of steps of the same round. The limit is '
        '1 + (passes - 1)/interval; "over the limit" of \'base again\', a second base run, is the noise. '
    )
    left_out = '; '.join(
        f'{name} in {setting}: {", ".join(str(k) for k in INTERVALS if k not in plan[1])}'
        for name, model in MODELS.items()
        for setting, plan in model.plan.items()
        if setting != 'plain' and len(plan[1]) < len(INTERVALS)
    )
    through = (
        '"outside passes" is what a step does besides forward and backward, over the base step: what the base step has '
        'of it is paid once in a step of several passes too. Stretches of an interval overlap: with few rounds their ± '
        f'is too small. Intervals left out to bound the run: {left_out}.'
    )
    tables = {
        'Trainer': Table(
            "Whole steps through Composer's Trainer",
            (*COLUMNS, "x Composer's SAM", 'outside passes, x base', 'remark'),
            note=note + through,
        ),
        'plain': Table(
            'Whole steps in a plain loop', (*COLUMNS, "x pytorch_optimizer's", 'remark'), note=note + _theirs()
        ),
    }
    for model in options.models:
        for setting in options.settings:
            key = f'{model}, {setting}'
            case = functools.partial(rows, model, setting, options.intervals, options.rounds, options.threads)
            allocator = 'default' if setting == 'default' else 'keeps'
            for row in report.case(key, functools.partial(apart, allocator, case)):
                # Nothing tells a plain loop's passes from the rest.
                shown = [*row[:-2], row[-1]] if setting == 'plain' else row
                tables['plain' if setting == 'plain' else 'Trainer'].add(model, setting, *shown)
    for table in tables.values():
        if table.rows:
            report.add(table)
    report.write()


def _theirs() -> str:
    try:
        return f'pytorch_optimizer is version {importlib.metadata.version("pytorch_optimizer")}.'
    except importlib.metadata.PackageNotFoundError:
        return 'pytorch_optimizer is not installed.'


if __name__ == '__main__':
    main()

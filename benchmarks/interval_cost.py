"""What an interval costs through Composer's Trainer: the average step, and the steps that do not perturb.

All variants train interleaved in one process, a step each in turn; averages are over chunks of as many steps as the
interval, each of which perturbs once. A step is timed from BATCH_START to BATCH_END: loading is not part of it, the
trainer's own work is.

    python -m benchmarks.interval_cost
    python -m benchmarks.interval_cost --models mlp --interval 10 --chunks 40
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.measure import median, spread
from benchmarks.report import Report, Table
from benchmarks.workloads import Batches, Clock, cifar_resnet18, digits_mlp, make_trainer
from composer_sam import registry

COLUMNS = ('model', 'batch', 'variant', 'ms per step', '±', 'x base, average step', '±', 'x base, plain steps', '±')
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    'resnet18': (cifar_resnet18, (3, 32, 32), 32),
    'mlp': (digits_mlp, (1, 8, 8), 64),
}


def interval_rows(model: str, variants: dict[str, Any], interval: int, chunks: int, device: torch.device) -> list[Any]:
    """The rows of the report for one model."""
    build, shape, size = MODELS[model]
    batches = Batches(size, interval, shape, device)
    trainers = {}
    for name, algorithm in variants.items():
        torch.manual_seed(0)
        clock = Clock(device)
        algorithms = [] if algorithm is None else [algorithm]
        trainers[name] = make_trainer(build().to(device), batches, algorithms, device=device, callbacks=[clock]), clock
    names = list(trainers)
    # Step by step in turn: what slows the machine for seconds slows all variants alike.
    for index in range((chunks + 1) * interval):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            trainers[name][0].fit(duration='1ba')
    seconds = {name: clock.seconds[interval:] for name, (_, clock) in trainers.items()}
    return [(model, size, name, *_figures(own, seconds['base'], interval)) for name, own in seconds.items()]


def _figures(own: Sequence[float], base: Sequence[float], interval: int) -> tuple[Any, ...]:
    starts = range(0, len(own), interval)
    chunks = [sum(own[i : i + interval]) for i in starts]
    ratios = [chunk / sum(base[i : i + interval]) for chunk, i in zip(chunks, starts, strict=True)]
    plain = [a / b for index, (a, b) in enumerate(zip(own, base, strict=True)) if (index + 1) % interval]
    average = [1e3 * chunk / interval for chunk in chunks]
    without = (median(plain), spread(plain)) if plain else (None, None)  # at interval 1 every step perturbs
    return median(average), spread(average), median(ratios), spread(ratios), *without


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=list(MODELS), choices=list(MODELS))
    parser.add_argument('--methods', nargs='+', default=['SAM'], choices=sorted(registry))
    parser.add_argument('--interval', type=int, default=10)
    parser.add_argument('--chunks', type=int, default=4, help='chunks of INTERVAL steps, after one uncounted')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--json', metavar='OUT', help='write the report here instead of benchmarks/results/')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    report = Report('interval_cost', vars(options), options.json)
    note = (
        'Medians of ratios to the base steps taken in the same round; ± is half the interquartile range. Plain steps '
        "are those that do not perturb. 'base again' is a second base trainer: its distance from 1 is the noise."
    )
    table = Table(f'Cost of interval {options.interval}', COLUMNS, note=note)
    for model in options.models:
        variants: dict[str, Any] = {'base': None, 'base again': None}
        for name in options.methods:
            variants[f'{name}, interval {options.interval}'] = registry[name](interval=options.interval)
        # The MLP's steps take a millisecond: it gets as many more.
        chunks = options.chunks * (10 if model == 'mlp' else 1)
        for row in interval_rows(model, variants, options.interval, chunks, torch.device(options.device)):
            table.add(*row)
    report.add(table)
    report.write()


if __name__ == '__main__':
    main()

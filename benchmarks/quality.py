"""Accuracy of every method at equal epochs and at equal compute, and accuracy and cost by interval.

Every task trains plain SGD, SGD for two and four times the epochs, and every method with the radius that did best on a
validation split: a part of the training images, with their label noise, another part for every seed. The test split is
looked at once, with that radius and at least five seeds. The other hyper-parameters are the recipe's, tuned for nobody.

    python -m benchmarks.quality                                  # digits, and CIFAR-10 (downloaded by torchvision)
    python -m benchmarks.quality --images DIR                     # CIFAR-10 as DIR/train/<class>, DIR/test/<class>
    python -m benchmarks.quality --tasks cifar10 --images DIR     # ResNet-18 on all of CIFAR-10: needs a GPU

Finished runs are stored in benchmarks/.work, so that the same command continues an interrupted benchmark.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.cifar import image_folder, small_folder
from benchmarks.quality_runs import VALIDATION, Candidate, Outcome, Task, best, equal_compute, train
from benchmarks.report import WORK, Report, Table, code

INTERVALS = (2, 5, 10)
CHOOSING_SEEDS = 2
LONGER = (1, 2, 4)

_MLP: dict[str, Sequence[dict[str, float]]] = {
    'SAM': [{'rho': rho} for rho in (0.1, 0.2, 0.5, 0.7)],
    'ASAM': [{'rho': rho} for rho in (0.5, 2.0, 4.0)],
    'WSAM': [{'rho': rho} for rho in (0.05, 0.2, 0.5)],
    'GAM': [{'grad_rho': rho, 'grad_norm_rho': 10 * rho} for rho in (0.02, 0.1, 0.2)],
}
_STUDY: dict[str, Sequence[dict[str, float]]] = {
    'SAMDirection': [{'rho': rho} for rho in (0.2, 0.5, 0.7)],
    'SAMMagnitude': [{'rho': rho} for rho in (0.2, 0.5, 0.7)],
    'SGDHess': [{'rho': rho} for rho in (0.05, 1.0)],
}
_RESNET: dict[str, Sequence[dict[str, float]]] = {
    'SAM': [{'rho': rho} for rho in (0.1, 0.2, 0.4)],
    'ASAM': [{'rho': rho} for rho in (0.5, 1.0, 2.0)],
    'WSAM': [{'rho': rho} for rho in (0.05, 0.1, 0.2)],
    'GAM': [{'grad_rho': rho, 'grad_norm_rho': 10 * rho} for rho in (0.01, 0.02, 0.05)],
}


def tasks(images: Callable[[], Path]) -> dict[str, Callable[[], Task]]:
    """Return the tasks by name; ``images`` returns the folder of CIFAR-10 when a task needs it."""

    def digits(noise: float) -> Task:
        radii = {**_MLP, **(_STUDY if noise == 0.4 else {})}
        overrides = (f'data.label_noise={noise}', 'data.eval_batch_size=450')
        name = f'digits, {noise:.0%} wrong labels'
        return Task(name, 'yamls/digits/sgd.yaml', overrides, 60, radii, intervals=noise == 0.4)

    def small() -> Task:
        root = small_folder(images(), train=200, test=200)
        overrides = (f'data.root={root}', 'data.eval_batch_size=400', 'model.depth=10')
        name = 'CIFAR-10, 2,000 images, 20% wrong labels'
        recipe = 'yamls/study/cifar10/sgd.yaml'
        return Task(name, recipe, overrides, 16, _RESNET, intervals=True, normalised=True)

    def full() -> Task:
        if not torch.cuda.is_available():
            raise SystemExit('the task cifar10 trains ResNet-18 on 50,000 images: it needs a GPU; try cifar10-small')
        overrides = ('data.name=image_folder', f'data.root={images()}', 'precision=amp_bf16')
        recipe = 'yamls/cifar10/resnet18_sgd.yaml'
        return Task('CIFAR-10, ResNet-18', recipe, overrides, 50, _RESNET, intervals=True, normalised=True)

    return {
        **{f'digits-{round(100 * noise)}': (lambda noise=noise: digits(noise)) for noise in (0.0, 0.2, 0.4, 0.6)},
        'cifar10-small': small,
        'cifar10': full,
    }


def run(task: Task, seeds: int, jobs: int | None, folder: Path) -> dict[str, Any]:
    """Choose the arguments on the validation split, then train and test; ``folder`` has the runs' files."""

    def trained(candidates: Sequence[Candidate], seeds: int, validation: bool) -> dict[Candidate, Outcome]:
        return train(task, candidates, seeds, folder, validation, jobs)

    candidates = {
        method: [Candidate(method, tuple(arguments.items())) for arguments in radii]
        for method, radii in task.radii.items()
    }
    validated = trained([c for own in candidates.values() for c in own], CHOOSING_SEEDS, validation=True)
    chosen = [best(own, validated) for own in candidates.values()]
    fixed, scaled = [], []
    if task.intervals:
        rho = float(dict(next(c for c in chosen if c.method == 'SAM').arguments)['rho'])
        fixed = [_sam(rho, interval) for interval in INTERVALS]
        wider = [[_sam(factor * rho, k) for factor in (math.sqrt(k), float(k))] for k in INTERVALS]
        validated |= trained([c for own in wider for c in own], CHOOSING_SEEDS, validation=True)
        scaled = [best(own, validated) for own in wider]
    plain = [Candidate(longer=longer) for longer in LONGER]
    tested = trained([*plain, *chosen, *fixed, *scaled], seeds, validation=False)

    def rows(outcomes: dict[Candidate, Outcome]) -> list[dict[str, Any]]:
        return [
            {
                'name': candidate.name,
                'method': candidate.method,
                'arguments': dict(candidate.arguments),
                'longer': candidate.longer,
                'chosen': candidate in chosen or candidate in scaled,
                'knob': 'fixed' if candidate in fixed else 'scaled' if candidate in scaled else '',
                **asdict(outcome),
            }
            for candidate, outcome in outcomes.items()
        ]

    return {'task': task.name, 'epochs': task.epochs, 'validated': rows(validated), 'tested': rows(tested)}


def _sam(rho: float, interval: int) -> Candidate:
    return Candidate('SAM', (('rho', float(f'{rho:.3g}')), ('interval', interval)))


def validation_table() -> Table:
    note = (
        f'Mean accuracy (%) over {CHOOSING_SEEDS} seeds on {VALIDATION:.0%} of the training images, with their wrong '
        'labels, another part for each seed; so no accuracy here can reach that on clean labels.'
    )
    return Table('Chosen on a validation split', ('task', 'candidate', 'accuracy', 'chosen'), note=note)


def test_table() -> Table:
    columns = (
        *('task', 'variant', 'method', 'knob', 'seeds', 'accuracy', '±', 'median', 'gradients per step', 'cost'),
        *('gain at equal epochs', '± 95%', 'SGD at equal compute', 'gain at equal compute', '± 95% there'),
        *('last training loss', 'ms per step'),
    )
    note = (
        'Accuracy (%) on the test split: mean ± standard deviation over the seeds. Knob: rho as at interval 1, or '
        'scaled, chosen on the validation split between rho sqrt(k) and rho k. Cost: time of the whole training '
        'by that of SGD of the same seed, median. Gains are in points over SGD, by seed: their mean ± half the 95% '
        'confidence interval (Student); a gain smaller than that is none. SGD at equal compute: for so many times the '
        'epochs that it costs as much as the variant or more (a tenth less is let pass); the gain there is over the '
        'accuracy of that SGD.'
    )
    return Table('Accuracy at equal epochs and at equal compute', columns, note=note)


def add(found: dict[str, Any], validation: Table, tested: Table) -> None:
    """Add the results of one task to the tables."""
    for row in found['validated']:
        validation.add(found['task'], row['name'], statistics.mean(row['accuracy']), row['chosen'])
    rows = found['tested']
    plain = {row['longer']: row for row in rows if row['method'] == 'SGD'}
    base = Outcome.of(plain[1])
    for row in rows:
        own = Outcome.of(row)
        cost = own.cost(base)
        longer = equal_compute(cost, LONGER)
        gain, sure = own.gain(base)
        fair, fair_sure = own.gain(Outcome.of(plain[longer]))
        tested.add(
            *(found['task'], row['name'], row['method'], row['knob']),
            *(len(row['accuracy']), statistics.mean(row['accuracy']), statistics.stdev(row['accuracy'])),
            *(statistics.median(row['accuracy']), statistics.mean(row['passes']), cost),
            *(gain, sure, plain[longer]['name'], fair, fair_sure),
            *(statistics.median(loss if loss is not None else math.nan for loss in row['train_loss']),),
            statistics.median(row['milliseconds']),
        )


def main() -> None:
    names = list(tasks(Path))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tasks', nargs='+', default=names[:-1], choices=names)
    parser.add_argument('--images', type=Path, metavar='DIR', help='CIFAR-10 as an image folder')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--jobs', type=int, help='runs side by side (default: one per core, one on a GPU)')
    parser.add_argument('--json', metavar='OUT', help='write the report here instead of benchmarks/results/')
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f'--seeds must be >= 2, got {options.seeds}: a spread needs two')

    folder = WORK / f'quality-{code()}'  # of the code that this process began with
    config = {key: value for key, value in vars(options).items() if key != 'images'}
    report = Report('quality', {**config, 'validation': VALIDATION, 'choosing_seeds': CHOOSING_SEEDS}, options.json)
    validation, tested = validation_table(), test_table()
    known = tasks(lambda: image_folder(options.images))
    for name in options.tasks:
        task = known[name]()
        report.config[name] = {**asdict(task), 'overrides': [o for o in task.overrides if 'data.root' not in o]}
        found = report.case(name, lambda task=task: run(task, options.seeds, options.jobs, folder))
        add(found, validation, tested)
    report.add(tested)
    report.add(validation)
    report.write()


if __name__ == '__main__':
    main()

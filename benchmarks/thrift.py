"""How much of SAM's gain its cheaper settings keep, and what is left of it beside cheap remedies.

On every task of the quality benchmark: SAM at intervals of 2 to 10, in a part of the run, with a first pass on a part
of the batch, and some of these together; methods that take fewer passes; and early stopping, weight decay, label
smoothing and EMA, with SGD and with SAM. The radius of each, and the strength of each remedy, is the one that did best
on a validation split; the test split is looked at once, with that.

    python -m benchmarks.thrift                                  # digits, and CIFAR-10 (downloaded by torchvision)
    python -m benchmarks.thrift --images DIR                     # CIFAR-10 as DIR/train/<class>, DIR/test/<class>
    python -m benchmarks.thrift --tasks digits-40 --seeds 2 --epochs 5 --json OUT       # a trial of minutes

Finished runs are stored in benchmarks/.work, so that the same command continues an interrupted benchmark. The runs of
one process are stored under the code it began with; ``--runs FOLDER`` goes on with those of an earlier version whose
steps are the same, and the report says so.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.allocator import apart
from benchmarks.cifar import image_folder
from benchmarks.first_backward import measured, table
from benchmarks.quality import CHOOSING_SEEDS, tasks
from benchmarks.quality_runs import VALIDATION, Candidate, Outcome, Task, best, train
from benchmarks.report import WORK, Report, code
from benchmarks.thrift_tables import remedies_table, settings_table, shares_table, validation_table
from benchmarks.thrift_variants import Variant, radii, variants


def run(task: Task, seeds: int, jobs: int | None, folder: Path) -> dict[str, Any]:
    """Choose on the validation split, then train and test; ``folder`` has the runs' files."""

    def trained(candidates: Sequence[Candidate], seeds: int, validation: bool) -> dict[Candidate, Outcome]:
        kind = 'validation' if validation else 'test'
        print(f'{task.name}: {len(dict.fromkeys(candidates))} candidates, {seeds} seeds, {kind}', flush=True)
        return train(task, candidates, seeds, folder, validation, jobs)

    sam = radii(task)
    validated = trained(sam, CHOOSING_SEEDS, validation=True)
    rho = float(dict(best(sam, validated).arguments)['rho'])
    every = variants(task, rho)
    searched = [variant for variant in every if len(variant.candidates) > 1]
    validated |= trained([c for variant in searched for c in variant.candidates], CHOOSING_SEEDS, validation=True)
    chosen = {v.name: best(v.candidates, validated) if v in searched else v.candidates[0] for v in every}
    tested = trained(list(chosen.values()), seeds, validation=False)

    def row(variant: Variant, candidate: Candidate, outcomes: dict[Candidate, Outcome]) -> dict[str, Any]:
        return {
            'variant': variant.name,
            'family': variant.family,
            'candidate': candidate.name,
            'longer': candidate.longer,
            'chosen': candidate == chosen[variant.name],
            **asdict(outcomes[candidate]),
        }

    looked_at = [Variant('SAM', 'SAM', tuple(sam)), *searched]
    return {
        'task': task.name,
        'validated': [row(variant, candidate, validated) for variant in looked_at for candidate in variant.candidates],
        'tested': [row(variant, chosen[variant.name], tested) for variant in every],
    }


def main() -> None:
    names = list(tasks(Path))[:-1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tasks', nargs='+', default=names, choices=names)
    parser.add_argument('--images', type=Path, metavar='DIR', help='CIFAR-10 as an image folder')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--epochs', type=int, help="for a trial: instead of the tasks' own")
    parser.add_argument('--jobs', type=int, help='runs side by side (default: one per core)')
    parser.add_argument('--runs', type=Path, metavar='FOLDER', help='the finished runs of an earlier version')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='of the first backward')
    parser.add_argument('--json', metavar='OUT', help='write the report here instead of benchmarks/results/')
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f'--seeds must be >= 2, got {options.seeds}: a spread needs two')

    folder = options.runs or WORK / f'thrift-{code()}'  # of the code that this process began with
    config = {key: value for key, value in vars(options).items() if key not in ('images', 'runs')}
    config |= {'runs of an earlier version': options.runs.name} if options.runs else {}
    report = Report('thrift', {**config, 'validation': VALIDATION, 'choosing_seeds': CHOOSING_SEEDS}, options.json)
    known = tasks(lambda: image_folder(options.images))
    found = []
    for name in options.tasks:
        task = known[name]()
        task = replace(task, epochs=options.epochs or task.epochs, radii={'SAM': task.radii['SAM']})
        report.config[name] = {**asdict(task), 'overrides': [o for o in task.overrides if 'data.root' not in o]}
        found.append(report.case(name, lambda task=task: run(task, options.seeds, options.jobs, folder)))
    backward = functools.partial(apart, 'keeps', measured, options.threads, 0.2 if options.epochs else 1.0)
    rows = report.case('first backward of the normalisation layers alone', backward)
    for made in (shares_table(found), remedies_table(found), settings_table(found), table(rows)):
        report.add(made)
    report.add(validation_table(found, CHOOSING_SEEDS))
    report.write()


if __name__ == '__main__':
    main()

"""What small language models keep through fine-tuning, quantisation and noise: SAM, its cheaper forms, and AdamW.

A GPT of 1.3 million parameters learns the sources of Python's standard library, then the text of ``help()``. The radii
of SAM and MSAM are those that keep the most on validation sequences, with a seed of their own; then every recipe is
trained with three seeds and measured once. AdamW is trained for as many steps as SAM, and for as many passes.

    python -m benchmarks.survival                     # about an hour on two cores
    python -m benchmarks.survival --seeds 1 --steps 20 --json OUT   # a trial of minutes

Finished runs are stored in benchmarks/.work, so that the same command continues an interrupted benchmark.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.report import WORK, Report, Table, code
from composer_sam.files import write_whole
from composer_sam.landscapes.pictures import png
from composer_sam.studies.survival.picture import draw
from composer_sam.studies.survival.plan import SurvivalOptions, Trials
from composer_sam.studies.survival.survive import survive
from composer_sam.studies.survival.tables import Survivor, common_level, lost_at, tables

ROOT = Path(__file__).resolve().parents[1]
ADAMW = ROOT / 'yamls' / 'lm' / 'adamw.yaml'
PICTURE = ROOT / 'docs' / 'survival.png'
SEED, SEARCH_SEED = 17, 16
RADII = {'sam': [0.01, 0.02, 0.05, 0.1], 'msam': [0.05, 0.3]}
RATES = [3.0e-4, 1.0e-3, 3.0e-3]
TRIALS = Trials(bits=(8, 4, 3, 2), noise=(0.05, 0.1, 0.2, 0.4), draws=3, samples=256)


def recipes(steps: int, rho: float, momentum_rho: float) -> list[dict[str, Any]]:
    """Return what the recipes say beyond that of AdamW."""
    cheaper: list[tuple[str, dict[str, Any]]] = [
        ('SAM', {'sam': {'rho': 0.05}}),
        *([(f'SAM, rho {rho:g}', {'sam': {'rho': rho}})] if rho != 0.05 else []),
        ('SAM, a quarter of the batch', {'sam': {'rho': rho, 'ascent_fraction': 0.25}}),
        ('SAM, last quarter', {'sam': {'rho': rho, 'start': '0.75dur'}}),
        ('SAM, last tenth', {'sam': {'rho': rho, 'start': '0.9dur'}}),
        ('MSAM', {'msam': {'rho': momentum_rho}}),
        ('FunctionalSAM', {'functional_sam': {'rho': rho}}),
    ]
    longer = [(f'AdamW, {factor:g}x the steps', {'max_duration': f'{round(factor * steps)}ba'}) for factor in (1.25, 2)]
    return [
        {'name': 'AdamW'},
        *({'name': name, **change} for name, change in longer),
        *({'name': name, 'algorithms': method} for name, method in cheaper),
    ]


def radii() -> list[dict[str, Any]]:
    """Return what the recipes of the search say beyond that of AdamW."""
    return [
        {'name': f'{method} {rho:g}', 'algorithms': {method: {'rho': rho}}}
        for method, values in RADII.items()
        for rho in values
    ]


def run(
    wanted: Sequence[dict[str, Any]], steps: int, tuned: int, seeds: int, out: Path, jobs: int | None, validation: bool
) -> list[Survivor]:
    """Train, test and fine-tune; with ``validation`` on sequences that are held out of the training text."""
    folder = out / 'recipes'
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        'base': str(ADAMW),
        'seed': SEARCH_SEED if validation else SEED,
        'max_duration': f'{steps}ba',
        'eval_interval': 0,
        'save_interval': f'{steps}ba',
        'data': {'validation_fraction': 0.1 if validation else 0.0},
    }

    def written(content: dict[str, Any], name: str) -> str:
        path = folder / f'{name}.yaml'
        OmegaConf.save(OmegaConf.create({**common, **content}), path)
        return str(path)

    paths = [written(content, str(number)) for number, content in enumerate(wanted)]
    data = {'source': 'pydoc', **common['data']}
    rates = {'optimizer.lr': RATES}
    tuning = {'name': 'fine-tuning', 'max_duration': f'{tuned}ba', 'data': data, 'grid': rates}
    return survive(SurvivalOptions(paths, written(tuning, 'finetune'), seeds=seeds, out=out, trials=TRIALS), jobs)


def searched(found: Sequence[Survivor]) -> tuple[Table, dict[str, float]]:
    """Return the table of the search, and for each method the radius with the smallest loss at equal learning."""
    level = common_level(found)
    assert level is not None
    table = Table(
        f'Radii on validation sequences: the losses where that on the other text has come down to {level:.3f}',
        ('method', 'rho', 'first text', 'lost'),
        note=f'One seed, {SEARCH_SEED}, which is none of the others. The smallest loss on the first text is chosen.',
    )
    losses: dict[str, dict[float, float]] = {}
    for one in found:
        method, rho = one.label.split(' ')
        lost = lost_at(one.frontier, level)
        assert one.measured.loss is not None and lost is not None
        losses.setdefault(method, {})[float(rho)] = one.measured.loss + lost
        table.add(method, float(rho), one.measured.loss + lost, lost)
    return table, {method: min(by_rho, key=lambda rho: by_rho[rho]) for method, by_rho in losses.items()}


def costs(found: Sequence[Survivor]) -> Table:
    """Return the time of training of every recipe."""
    seconds: dict[str, list[float]] = {}
    for one in found:
        seconds.setdefault(one.label, []).append(one.run.seconds)
    baseline = statistics.fmean(seconds['AdamW'])
    table = Table('Time of training', ('recipe', 'steps', "of AdamW's time"), note='Two runs side by side.')
    for one in found:
        if one.run.seed == SEED:
            table.add(one.label, one.run.steps, statistics.fmean(seconds[one.label]) / baseline)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=400, help='of training')
    parser.add_argument('--tuned', type=int, default=60, help='steps of fine-tuning')
    parser.add_argument('--jobs', type=int, help='runs side by side (default: one per core)')
    parser.add_argument('--json', metavar='OUT', help='write the report here instead of benchmarks/results/')
    options = parser.parse_args()
    report = Report('survival', {**vars(options), 'trials': vars(TRIALS), 'rates': RATES}, options.json)
    folder = WORK / f'survival-{code()}-{options.steps}-{options.tuned}'
    lengths = (options.steps, options.tuned)

    def search() -> dict[str, float]:
        found = run(radii(), *lengths, 1, folder / 'search', options.jobs, validation=True)
        return searched(found)[1]

    def compared() -> None:
        run(wanted, *lengths, options.seeds, folder / 'runs', options.jobs, validation=False)

    best = report.case('search of the radii', search)
    wanted = recipes(options.steps, best['sam'], best['msam'])
    report.case('training, tests and fine-tuning', compared)
    # Read from their files, as in a report that goes on.
    report.add(searched(run(radii(), *lengths, 1, folder / 'search', options.jobs, validation=True))[0])
    found = run(wanted, *lengths, options.seeds, folder / 'runs', options.jobs, validation=False)
    for title, headings, rows in tables(found):
        report.add(Table(title, headings, [*rows]))
    report.add(costs(found))
    picture = (Path(options.json) if options.json else PICTURE).with_suffix('.png')
    write_whole(picture, png(draw(found)))
    report.write()


if __name__ == '__main__':
    main()

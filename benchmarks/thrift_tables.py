"""The tables of the benchmark of cheap settings: the share of SAM's gain that each keeps, and what is said of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality_runs import VALIDATION, Outcome, equal_compute
from benchmarks.report import Table
from benchmarks.thrift_variants import LONGER, REMEDIES

__all__ = [
    'GOAL_PASSES',
    'GOAL_SHARE',
    'NONE',
    'REMEDIES_BESIDE',
    'SHARES',
    'SHARES_COLUMNS',
    'goal',
    'remedies_table',
    'settings_table',
    'share_kept',
    'shares_table',
    'validation_table',
    'verdict',
    'with_gain',
]

GOAL_PASSES, GOAL_SHARE = 1.25, 90.0  # passes per step, and percent of SAM's gain
REMEDIES_BESIDE = 'SAM beside cheap remedies'
SHARES = "Share of SAM's gain that is kept"
NONE = '-'
SHARES_COLUMNS = ('variant', 'family', 'passes', 'goal', 'smallest share')

Row = dict[str, Any]
Found = Mapping[str, Any]  # the results of a task


def share_kept(gain: float, sam: tuple[float, float]) -> float | str:
    """Return a gain in percent of SAM's, or ``-`` where SAM's is not larger than half its 95% interval."""
    mean, half = sam
    return 100 * gain / mean if mean > half else NONE


def with_gain(tasks: Sequence[Found]) -> list[str]:
    """Return the names of the tasks on which SAM has a gain."""
    gains = {found['task']: _outcome(found, 'SAM').gain(_outcome(found, 'SGD')) for found in tasks}
    return [task for task, gain in gains.items() if share_kept(0.0, gain) != NONE]


def settings_table(tasks: Sequence[Found]) -> Table:
    """Return accuracy, gain and cost of every setting on every task."""
    columns = (
        *('task', 'variant', 'chosen', 'seeds', 'accuracy', '±', 'gain', '± 95%', "share of SAM's gain (%)"),
        *(
            'against SAM',
            '± 95% there',
            'passes',
            'SGD at equal compute',
            'gain at equal compute',
            '± 95% of it',
        ),
    )
    note = (
        'Accuracy (%) on the test split: mean ± standard deviation over the seeds; a run whose loss was not finite '
        'counts as 0 %. Gains are in points over SGD, and against SAM over SAM, by seed: their mean ± half the 95% '
        "confidence interval (Student). The share is given where SAM's gain is larger than that. Passes per step, "
        'counted in samples: SGD has 1. A part of the run is rounded to whole epochs: the last 10% of 16 epochs are '
        'two of them. SGD at equal compute: for so many times the epochs that it takes as many passes as the variant '
        'or more (a tenth less is let pass).'
    )
    table = Table('Gain and cost of every setting', columns, note=note)
    for found in tasks:
        plain = {times: row for row in found['tested'] for times in [row['longer']] if row['family'] == 'SGD'}
        base, sam = Outcome.of(plain[1]), _outcome(found, 'SAM')
        for row in found['tested']:
            own = Outcome.of(row)
            passes = row['longer'] * statistics.mean(own.passes)
            longer = equal_compute(passes, LONGER)
            gain, half = own.gain(base)
            table.add(
                *(found['task'], row['variant'], row['candidate'], len(own.accuracy)),
                *(statistics.mean(own.accuracy), statistics.stdev(own.accuracy), gain, half),
                *(share_kept(gain, sam.gain(base)), *own.gain(sam), passes),
                *(plain[longer]['candidate'], *own.gain(Outcome.of(plain[longer]))),
            )
    return table


def shares_table(tasks: Sequence[Found]) -> Table:
    """Return the share of SAM's gain of every setting, by task, the setting that keeps most first."""
    gaining = [found for found in tasks if found['task'] in with_gain(tasks)]
    columns = (*SHARES_COLUMNS, *(found['task'] for found in gaining))
    rows = []
    for name, family in _names(tasks).items():
        every = [found for found in tasks if name in _variants(found)]
        shares = {f['task']: _share(f, name) for f in gaining if f in every}
        passes = max(statistics.mean(_outcome(found, name).passes) for found in every)
        smallest = min(shares.values(), default=math.nan)
        reached = goal(passes, smallest) and len(shares) == len(gaining)
        of_tasks = [shares.get(found['task'], NONE) for found in gaining]
        rows.append((name, family, passes, 'yes' if reached else 'no', smallest, *of_tasks))
    rows.sort(key=lambda row: -row[4])
    said = verdict([dict(zip(columns, row, strict=True)) for row in rows])
    note = (
        f"{said} Shares are in percent of SAM's gain over SGD "
        'at equal epochs, on the tasks where that gain is larger than half its 95% interval. The goal: at most '
        f'{GOAL_PASSES} passes per step and at least {GOAL_SHARE:.0f} % on every such task. Passes: counted in '
        'samples, the most of any task. What they cost in time is in cheap_steps.md.'
    )
    table = Table(SHARES, columns, note=note)
    for row in rows:
        table.add(*row)
    return table


def goal(passes: float, smallest: float) -> bool:
    """Return whether a setting reaches the goal; a thousandth of a pass is a batch that does not divide evenly."""
    return passes <= GOAL_PASSES + 1e-3 and smallest >= GOAL_SHARE


def verdict(rows: Sequence[Row]) -> str:
    """Return in words which settings reach the goal, or which comes nearest and where it falls short.

    Args:
        rows: those of :func:`shares_table`, by column.
    """
    tasks = [column for column in rows[0] if column not in SHARES_COLUMNS]
    if not tasks:
        return 'SAM has a gain on none of the tasks, so there is nothing to keep.'
    everywhere = [row for row in rows if all(row[task] != NONE for task in tasks)]
    keeping = [row for row in everywhere if row['variant'] != 'SAM' and row['smallest share'] >= GOAL_SHARE]
    reaching = [row for row in keeping if goal(row['passes'], row['smallest share'])]
    if reaching:
        ordered = sorted(reaching, key=lambda row: (row['passes'], -row['smallest share']))
        return f'At {GOAL_PASSES} passes per step or less, {" and ".join(_said(row) for row in ordered)}.'
    cheap = [row for row in everywhere if goal(row['passes'], math.inf)]
    nearest = max(cheap, key=lambda row: row['smallest share'])
    short = '; '.join(f'{nearest[task]:.0f} % on {task}' for task in tasks if nearest[task] < GOAL_SHARE)
    said = (
        f"No setting at {GOAL_PASSES} passes per step or less keeps {GOAL_SHARE:.0f} % of SAM's gain on every task. "
        f'The nearest, "{nearest["variant"]}" at {nearest["passes"]:.3g} passes, keeps {short}.'
    )
    if keeping:
        least = min(keeping, key=lambda row: row['passes'])
        said += f' The cheapest that does is "{least["variant"]}" at {least["passes"]:.3g} passes.'
    return said


def remedies_table(tasks: Sequence[Found]) -> Table:
    """Return what is left of SAM's gain beside every remedy."""
    columns = (
        *('task', 'remedy', 'SGD with it', '±', 'gain of the remedy', '± 95%', 'SAM with it', '± of SAM'),
        *('gain of SAM beside it', '± 95% of SAM', 'chosen with SGD', 'chosen with SAM'),
    )
    note = (
        'Accuracy (%) on the test split: mean ± standard deviation over the seeds. The gain of the remedy is over SGD '
        'alone, that of SAM over SGD with the same remedy, in points: mean ± half the 95% confidence interval. The '
        "strength of a remedy is chosen on the validation split, for SGD and for SAM separately, at SAM's own radius. "
        'Early stopping trains on nine tenths of the images; the others choose the epoch.'
    )
    table = Table(REMEDIES_BESIDE, columns, note=note)
    for found in tasks:
        base = _outcome(found, 'SGD')
        for remedy in ('', *REMEDIES):
            names = [f'{method}, {remedy}' if remedy else method for method in ('SGD', 'SAM')]
            plain, sam = (_outcome(found, name) for name in names)
            table.add(
                *(found['task'], remedy or 'none', *_accuracy(plain), *plain.gain(base), *_accuracy(sam)),
                *(*sam.gain(plain), *(_variants(found)[name]['candidate'] for name in names)),
            )
    return table


def validation_table(tasks: Sequence[Found], seeds: int) -> Table:
    """Return what the validation split said of every candidate."""
    note = (
        f'Mean accuracy (%) over {seeds} seeds on {VALIDATION:.0%} of the training images, with their wrong labels, '
        'another part for each seed. Settings without a choice are not in this table.'
    )
    table = Table('Chosen on a validation split', ('task', 'variant', 'candidate', 'accuracy', 'chosen'), note=note)
    for found in tasks:
        for row in found['validated']:
            table.add(found['task'], row['variant'], row['candidate'], statistics.mean(row['accuracy']), row['chosen'])
    return table


def _variants(found: Found) -> dict[str, Row]:
    return {row['variant']: row for row in found['tested']}


def _outcome(found: Found, variant: str) -> Outcome:
    return Outcome.of(_variants(found)[variant])


def _share(found: Found, variant: str) -> float:
    base = _outcome(found, 'SGD')
    gain, _ = _outcome(found, variant).gain(base)
    return float(share_kept(gain, _outcome(found, 'SAM').gain(base)))


def _names(tasks: Sequence[Found]) -> dict[str, str]:
    """Return the settings of the first table with their families: methods, and no remedies."""
    rows = [row for found in tasks for row in found['tested']]
    return {row['variant']: row['family'] for row in rows if row['family'] not in ('SGD', 'remedy')}


def _accuracy(outcome: Outcome) -> tuple[float, float]:
    return statistics.mean(outcome.accuracy), statistics.stdev(outcome.accuracy)


def _said(row: Row) -> str:
    return f"{row['variant']} keeps {row['smallest share']:.0f} % of SAM's gain or more on every task"

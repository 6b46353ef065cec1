"""The tables of a survival study."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from composer_sam.studies.result import RunResult
from composer_sam.studies.survival.results import Finetuned, Measured
from composer_sam.studies.texts import Tabulated, grouped, labelled, mean_text, values_text

__all__ = ['Survivor', 'common_level', 'least_lost', 'lost_at', 'mean_of', 'survivors', 'tables']

Point = tuple[float, float]  # the loss on the other text, and the growth of the loss on the first


@dataclass(frozen=True)
class Survivor:
    """A trained network and what became of it.

    Attributes:
        label: the recipe, with the values of its grid.
        run: the run that trained it.
        measured: its losses, as it is and damaged.
        finetuned: its fine-tunings, in the order of the grid.
    """

    label: str
    run: RunResult
    measured: Measured
    finetuned: list[Finetuned]

    @property
    def points(self) -> list[Point]:
        """The losses before the fine-tuning, and after every one; without those that are not finite."""
        first = self.measured.loss
        if first is None or not self.finetuned:
            return []
        pairs = [(self.finetuned[0].before, first), *((one.after, one.first) for one in self.finetuned)]
        return [(other, own - first) for other, own in pairs if other is not None and own is not None]

    @property
    def frontier(self) -> list[Point]:
        """The points of which no other has learned at least as much and lost no more, from little learning to much."""
        found: list[Point] = []
        for point in sorted(set(self.points)):
            if not found or point[1] < found[-1][1]:
                found.append(point)
        return found[::-1]


def survivors(
    runs: Iterable[RunResult], measured: Iterable[Measured], finetuned: Iterable[Finetuned]
) -> list[Survivor]:
    """Return the networks that were trained and measured, with what became of them."""
    by_name = {one.name: one for one in measured}
    tunings = grouped(finetuned, lambda one: one.network)
    return [
        Survivor(labelled(run.recipe, run.values), run, by_name[run.name], tunings.get(run.name, []))
        for run in runs
        if run.name in by_name
    ]


def common_level(found: Sequence[Survivor]) -> float | None:
    """Return the smallest loss on the other text that every network reaches by some fine-tuning; None without any."""
    best = [one.frontier[-1][0] for one in found if one.points]
    return max(best) if best else None


def lost_at(frontier: Sequence[Point], level: float) -> float | None:
    """Return the growth of the loss on the first text where the loss on the other has come down to ``level``.

    Between two points of the frontier it is interpolated.

    Args:
        frontier: the points, from little learning to much.
        level: a loss on the other text.

    Returns:
        None if the frontier does not reach the level.
    """
    for (above, lost), (below, more) in itertools.pairwise(frontier):
        if below <= level < above:
            return lost + (more - lost) * (above - level) / (above - below)
    return frontier[0][1] if frontier and frontier[0][0] <= level else None


def tables(found: Sequence[Survivor]) -> list[Tabulated]:
    """Return the tables; cells are means and standard deviations over the seeds."""
    by_label = grouped(found, lambda one: one.label)

    def rows(*cells: Callable[[Survivor], float | None]) -> list[list[str]]:
        return [
            [label, str(len(group)), *(_cell([cell(one) for one in group]) for cell in cells)]
            for label, group in by_label.items()
        ]

    trials = found[0].measured
    damages: list[tuple[str, Callable[[Survivor], float | None]]] = [
        *((f'{bits} bits', _quantized(bits)) for bits in trials.quantized),
        *((f'noise {size}', _noisy(size)) for size in trials.noisy),
    ]
    made: list[Tabulated] = [
        (
            'Loss on the first text, and how much quantised and noisy weights lose',
            ['', 'seeds', 'loss', *(f'lost: {name}' for name, _ in damages)],
            rows(lambda one: one.measured.loss, *(_growth(read) for _, read in damages)),
        )
    ]
    level = common_level(found)
    if level is None:
        return made
    points: list[dict[str, Any]] = []
    for tuned in (tuned for one in found for tuned in one.finetuned):
        points += [tuned.values] if tuned.values not in points else []
    for values in points:
        where = values_text(values)
        made.append(
            (
                f'Fine-tuned on the other text{f", {where}" if where else ""}',
                ['', 'seeds', 'other text before', 'other text after', 'first text after', 'lost'],
                rows(
                    _tuning(values, lambda one: one.before),
                    _tuning(values, lambda one: one.after),
                    _tuning(values, lambda one: one.first),
                    _growth(_tuning(values, lambda one: one.first)),
                ),
            )
        )

    def lost(one: Survivor) -> float | None:
        return lost_at(one.frontier, level)

    made.append(
        (
            f'At equal learning: where the loss on the other text has come down to {level:.3f}',
            ['', 'seeds', 'first text', 'lost'],
            rows(lambda one: _plus(one.measured.loss, lost(one)), lost),
        )
    )
    return made


def least_lost(found: Sequence[Survivor]) -> list[tuple[str, str, float]]:
    """Return whose loss on the first text has grown least on average, and by how much.

    Returns:
        What was done to the networks, the label, and the growth: for fine-tuning to a loss that all reach, for the
        fewest bits and for the largest noise; what was not done or has failed is left out.
    """
    level, trials = common_level(found), found[0].measured
    reads: list[tuple[str, Callable[[Survivor], float | None]]] = []
    if level is not None:
        reads.append(('at equal learning', lambda one: lost_at(one.frontier, level)))
    if trials.quantized:
        bits = min(trials.quantized, key=int)
        reads.append((f'at {bits} bits', _growth(_quantized(bits))))
    if trials.noisy:
        size = max(trials.noisy, key=float)
        reads.append((f'with noise {size}', _growth(_noisy(size))))
    by_label = grouped(found, lambda one: one.label)
    best = []
    for what, read in reads:
        means = {label: mean_of([read(one) for one in group]) for label, group in by_label.items()}
        known = {label: mean for label, mean in means.items() if mean is not None}
        if len(known) == len(means) > 1:
            label = min(known, key=lambda name: known[name])
            best.append((what, label, known[label]))
    return best


def _cell(values: Sequence[float | None]) -> str:
    """Return the mean and the standard deviation over the seeds; a network without a number makes them unknown."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f'none for {len(values) - len(known)} of {len(values)}'
    return mean_text(known, 4)


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean; None if one of the values is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _quantized(bits: str) -> Callable[[Survivor], float | None]:
    return lambda one: one.measured.quantized[bits]


def _noisy(size: str) -> Callable[[Survivor], float | None]:
    return lambda one: mean_of(one.measured.noisy[size])


def _tuning(values: dict[str, Any], read: Callable[[Finetuned], Any]) -> Callable[[Survivor], float | None]:
    return lambda one: next((read(tuned) for tuned in one.finetuned if tuned.values == values), None)


def _growth(read: Callable[[Survivor], float | None]) -> Callable[[Survivor], float | None]:
    def growth(one: Survivor) -> float | None:
        after = read(one)
        return None if after is None or one.measured.loss is None else after - one.measured.loss

    return growth


def _plus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other

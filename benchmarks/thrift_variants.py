"""The settings that the benchmark of cheap settings compares, and the candidates from which each chooses its radius.

Every radius is a multiple of the one that is best for SAM at every step of the task, so that a setting can be compared
on tasks whose radii differ: the same, the square root of the interval times as large, and the interval times as large.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.quality_runs import Candidate, Remedy, Task

__all__ = ['LONGER', 'REMEDIES', 'Variant', 'radii', 'variants']

LONGER = (1, 1.25, 2)
REMEDIES = ('early stopping', 'weight decay', 'label smoothing', 'EMA')
_WEIGHT_DECAYS = (1e-3, 3e-3, 1e-2)
_SMOOTHINGS = (0.1, 0.3)
_HALF_LIVES = (0.05, 0.15)  # in parts of the run, so that of the initial weights a hundredth is left at its end
_STOPPING = 0.1  # the part of the training images that chooses the epoch

Arguments = dict[str, float | str]


@dataclass(frozen=True)
class Variant:
    """A setting that users would compare, and the candidates from which the validation split chooses.

    Attributes:
        name: its name in tables and pictures, without what is chosen.
        family: settings that differ in one number only have the same.
        candidates: the smallest radius first; with one candidate there is nothing to choose.
    """

    name: str
    family: str
    candidates: tuple[Candidate, ...]


def radii(task: Task) -> list[Candidate]:
    """Return the candidates from which SAM's own radius is chosen."""
    return [Candidate('SAM', tuple(arguments.items())) for arguments in task.radii['SAM']]


def variants(task: Task, rho: float) -> list[Variant]:
    """Return everything that is compared on a task whose best radius for SAM is ``rho``."""
    return [*_plain(), *_methods(task, rho), *_remedies(task, rho)]


def _plain() -> Iterator[Variant]:
    for longer in LONGER:
        yield Variant(Candidate(longer=longer).name, 'SGD', (Candidate(longer=longer),))


def _methods(task: Task, rho: float) -> Iterator[Variant]:
    def vary(
        name: str, family: str, factors: Sequence[float], method: str = 'SAM', **arguments: float | str
    ) -> Variant:
        radii = [_rounded(factor * rho) for factor in factors]
        made = tuple(Candidate(method, (('rho', radius), *arguments.items())) for radius in radii)
        return Variant(name, family, made)

    def epoch(part: float) -> str:
        return f'{round(part * task.epochs)}ep'  # a Trainer counts parts of such a run in whole epochs too

    yield vary('SAM', 'SAM', [1])
    for k in (2, 3, 5, 10):
        yield vary(f'interval={k}', 'interval', _rarer(k), interval=k)
    for part in (0.1, 0.25, 0.5):
        yield vary(f'in the last {part:.0%}', 'start', [1, 2], start=epoch(1 - part))
    for part in (0.1, 0.25, 0.5):
        yield vary(f'in the first {part:.0%}', 'end', [1], end=epoch(part))
    for part in (0.1, 0.25, 0.5):
        yield vary(f'ascent_fraction={part}', 'ascent_fraction', [1, 1.4], ascent_fraction=part)
    yield vary('MSAM', 'MSAM', [1, 3, 9], 'MSAM')
    for k in (5, 10):
        yield vary(f'LookSAM, k={k}', 'LookSAM', [0.5, 1], 'LookSAM', k=k)
    yield vary('AESAM', 'AESAM', [1, 2], 'AESAM')
    yield vary('AESAM, lambda_1=1', 'AESAM', [1, 2], 'AESAM', lambda_1=1)
    for p in (0.2, 0.5):
        yield vary(f'RandomSAM, p={p}', 'RandomSAM', _rarer(1 / p), 'RandomSAM', p=p)
    if task.normalised:
        yield vary("parameters='normalization'", 'normalization', [1, 3, 10], parameters='normalization')

    yield vary('interval=2, ascent_fraction=0.25', 'both', _rarer(2), interval=2, ascent_fraction=0.25)
    yield vary('interval=2, ascent_fraction=0.5', 'both', _rarer(2), interval=2, ascent_fraction=0.5)
    half = epoch(0.5)
    yield vary('in the last 50%, interval=5', 'both', _rarer(5), start=half, interval=5)
    yield vary('in the last 50%, interval=2', 'both', _rarer(2), start=half, interval=2)
    yield vary('in the last 50%, ascent_fraction=0.25', 'both', [1, 2], start=half, ascent_fraction=0.25)
    yield vary('in the last 50%, ascent_fraction=0.5', 'both', [1, 2], start=half, ascent_fraction=0.5)
    yield vary('MSAM in the last 50%', 'both', [1, 3, 9], 'MSAM', start=half)


def _rarer(interval: float) -> list[float]:
    """Return the factors on the radius where only one in ``interval`` steps is perturbed."""
    return [1, math.sqrt(interval), interval]


def _rounded(rho: float) -> float:
    return float(f'{rho:.3g}')


def _remedies(task: Task, rho: float) -> Iterator[Variant]:
    for method, arguments in (('SGD', ()), ('SAM', (('rho', rho),))):
        for name, settings in zip(REMEDIES, _settings(task.epochs), strict=True):
            made = tuple(Candidate(method, arguments, remedy=remedy) for remedy in settings)
            yield Variant(f'{method}, {name}', 'remedy', made)


def _settings(epochs: int) -> Iterator[list[Remedy]]:
    """Yield the settings of every remedy, in the order of :data:`REMEDIES`."""
    stopping = ('early_stopping=true', f'data.validation_fraction={_STOPPING}', 'eval_interval=1ep')
    yield [Remedy('early stopping', stopping)]
    yield [Remedy(f'weight decay {decay:g}', (f'optimizer.weight_decay={decay}',)) for decay in _WEIGHT_DECAYS]
    smoothing = 'algorithms.label_smoothing.smoothing'
    yield [Remedy(f'label smoothing {part:g}', (f'{smoothing}={part}',)) for part in _SMOOTHINGS]
    lives = dict.fromkeys(max(1, round(part * epochs)) for part in _HALF_LIVES)
    yield [Remedy(f'EMA, half-life {life} epochs', (f'algorithms.ema.half_life={life}ep',)) for life in lives]

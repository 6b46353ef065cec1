"""The sharpness of trained networks and of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from composer_sam.diagnostics.measure import Measurements, measure
from composer_sam.landscapes.grid import measuring
from composer_sam.recipes import Recipe
from composer_sam.studies.checkpoints import load_weights
from composer_sam.studies.console import Advance
from composer_sam.studies.problem import Problem, Split, build_problem

__all__ = ['CheckpointMeasurements', 'Sharpness', 'measure_checkpoints', 'measure_trained']


@dataclass(frozen=True)
class Sharpness:
    """How the sharpness of a trained network is measured.

    Attributes:
        samples: the number of training samples, which are not augmented.
        rho: the radius of SAM sharpness.
    """

    samples: int = 512
    rho: float = 0.05


@dataclass(frozen=True)
class CheckpointMeasurements:
    """The measurements of a checkpoint.

    Attributes:
        label: the name of the checkpoint.
        path: its file.
        split: the split of the data.
        accuracy: its accuracy on the samples, in [0, 1]; None where the network is no classifier.
        measurements: the measurements on the same samples.
    """

    label: str
    path: Path
    split: Split
    accuracy: float | None
    measurements: Measurements

    def as_dict(self) -> dict[str, str | float]:
        """Return strings and numbers by name; only those that are known."""
        known = {} if self.accuracy is None else {'accuracy': self.accuracy}
        named = {'label': self.label, 'checkpoint': str(self.path), 'split': self.split}
        return {**named, **known, **self.measurements.as_dict()}


def measure_checkpoints(
    recipe: Recipe,
    paths: Sequence[Path],
    labels: Sequence[str],
    *,
    split: Split = 'train',
    samples: int = 512,
    progress: Advance = lambda label, done, of: None,
    **options: Any,
) -> list[CheckpointMeasurements]:
    """Measure every checkpoint by :func:`composer_sam.diagnostics.measure.measure`.

    Args:
        recipe: the recipe of the checkpoints.
        paths: the checkpoints.
        labels: their names.
        split: the split of the data.
        samples: the number of samples.
        progress: called with a word, the number of checkpoints that are measured and the number of all.
        options: further arguments of ``measure``.
    """
    problem = build_problem(recipe, split, samples)
    for path in paths:  # all files are read before the first is measured, which can take long
        load_weights(problem.model, path)
    found = []
    for done, (path, label) in enumerate(zip(paths, labels, strict=True)):
        progress('measured', done, len(paths))
        load_weights(problem.model, path)
        with measuring(problem.model, None, problem.batches) as evaluated:
            _, accuracy = evaluated({})
        measured = measure(problem.model, None, problem.batches, microbatch=problem.microbatch, **options)
        known = None if math.isnan(accuracy) else accuracy
        found.append(CheckpointMeasurements(label, path, split, known, measured))
    progress('measured', len(paths), len(paths))
    return found


def measure_trained(model: nn.Module, problem: Problem, sharpness: Sharpness, measures: Sequence[str]) -> Measurements:
    """Measure a network that was just trained.

    Args:
        model: the network, on the device of the problem.
        problem: the samples.
        sharpness: the options; the number of samples is that of the problem.
        measures: some of ``composer_sam.diagnostics.measure.MEASURES``.
    """
    return measure(model, None, problem.batches, measures=measures, rho=sharpness.rho, microbatch=problem.microbatch)

"""The result of one run of a study, and its file."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from composer_sam.diagnostics.measure import Measurements

__all__ = ['RunResult', 'TrainedSharpness', 'finite']


@dataclass(frozen=True)
class TrainedSharpness:
    """The sharpness of a trained network on training samples, or why it could not be measured.

    Attributes:
        loss: the loss; like all others None where it is not finite or not known.
        gradient_norm: the L2 norm of its gradient.
        top_eigenvalue: the largest eigenvalue of its Hessian.
        trace: the trace of its Hessian.
        trace_stderr: the standard error of the trace.
        sam_sharpness: the growth of the loss within the radius.
        samples: the number of samples.
        seed: the seed of everything random.
        seconds: wall time.
        error: why a network, such as one that has diverged, could not be measured; None if it was.
    """

    loss: float | None = None
    gradient_norm: float | None = None
    top_eigenvalue: float | None = None
    trace: float | None = None
    trace_stderr: float | None = None
    sam_sharpness: float | None = None
    samples: int | None = None
    seed: int | None = None
    seconds: float | None = None
    error: str | None = None

    @classmethod
    def of(cls, measured: Measurements) -> TrainedSharpness:
        """Take the numbers from ``measured``."""
        return cls(**{field.name: getattr(measured, field.name) for field in fields(cls) if field.name != 'error'})

    def to_json(self) -> dict[str, Any]:
        """Return the numbers by name, or the error alone."""
        if self.error is not None:
            return {'error': self.error}
        return {name: value for name, value in vars(self).items() if name != 'error'}


@dataclass(frozen=True)
class RunResult:
    """The result of a run, as its file holds it. A number that is not finite is None.

    Attributes:
        name: the name of the run and of its file.
        recipe: the name of the recipe.
        values: the values of the grid's keys.
        seed: the seed of the run.
        accuracy: test accuracy at the end, in [0, 1].
        test_loss: test loss at the end.
        train_loss: mean training loss of the last epoch.
        steps: optimizer steps.
        seconds: wall time of all steps.
        sharpness: the sharpness of the trained network, None if it was not to be measured.
        train: training loss by ``epoch``.
        test: test accuracy and loss by ``epoch``.
        geometry: the mean over every epoch of the metrics of
            :class:`~composer_sam.trainers.composer.GradientGeometryMonitor`, by ``epoch``; None for a plain optimizer.
        threads: the number of threads.
        versions: the versions of the packages and of Python.
        config: everything the result depends on.
    """

    name: str
    recipe: str
    values: dict[str, Any]
    seed: int
    accuracy: float | None
    test_loss: float | None
    train_loss: float | None
    steps: int
    seconds: float
    sharpness: TrainedSharpness | None
    train: dict[str, list[float]]
    test: dict[str, list[float]]
    geometry: dict[str, list[float]] | None
    threads: int
    versions: dict[str, str]
    config: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return JSON's own types; null stands for a number that is not finite."""
        return finite({**vars(self), 'sharpness': None if self.sharpness is None else self.sharpness.to_json()})

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> RunResult:
        """Return the result that :meth:`to_json` turned into ``found``.

        Raises:
            TypeError: a key is missing, or there is an unknown one.
        """
        sharpness = found.get('sharpness')
        return cls(**{**found, 'sharpness': None if sharpness is None else TrainedSharpness(**sharpness)})


def finite(value: Any) -> Any:
    """Return nested lists and mappings with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

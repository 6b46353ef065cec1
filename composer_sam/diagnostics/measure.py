"""Several measures of one model in one call."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from composer_sam.diagnostics.ascent import check_ascent, check_eta
from composer_sam.diagnostics.checks import Loss, check_at_least, check_positive
from composer_sam.diagnostics.hessian import top_eigenvalues, trace
from composer_sam.diagnostics.keywords import keywords_of
from composer_sam.diagnostics.objective import Objective
from composer_sam.diagnostics.sharpness import adaptive_sharpness, first_order_flatness, sam_sharpness
from composer_sam.vectors import norm

__all__ = ['MEASURES', 'MeasureOptions', 'Measurements', 'check_measures', 'measure', 'measure_objective']

MEASURES = (
    'loss',
    'gradient_norm',
    'top_eigenvalue',
    'trace',
    'sam_sharpness',
    'adaptive_sharpness',
    'first_order_flatness',
)


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    r"""The options of the measures, which :func:`measure` and ``SharpnessMonitor`` take as keywords.

    Args:
        k: the number of eigenvalues, :math:`\ge 1`.
        probes: the number of Hessian products for the trace by Hutch++, :math:`\ge 6`.
        rho: the radius of :func:`~composer_sam.diagnostics.sharpness.sam_sharpness`, > 0.
        adaptive_rho: the radius of :func:`~composer_sam.diagnostics.sharpness.adaptive_sharpness`, > 0.
        eta: :math:`\eta \ge 0` of :func:`~composer_sam.diagnostics.sharpness.adaptive_sharpness`.
        flatness_rho: the radius of :func:`~composer_sam.diagnostics.sharpness.first_order_flatness`, > 0.
        ascent: ``'projected'`` or ``'first_order'``, for both kinds of sharpness and for flatness.
        steps: the number of evaluations of each projected ascent, :math:`\ge 0`.
        tol: the tolerance of the eigenvalues, > 0, see :func:`~composer_sam.diagnostics.hessian.top_eigenvalues`.

    Raises:
        ValueError: an option is out of its range.
    """

    k: int = 1
    probes: int = 30
    rho: float = 0.05
    adaptive_rho: float = 0.5
    eta: float = 0.01
    flatness_rho: float = 0.2
    ascent: str = 'projected'
    steps: int = 20
    tol: float = 1e-3

    def __post_init__(self) -> None:
        check_at_least('k', self.k, 1)
        check_at_least('probes', self.probes, 6)
        check_eta(self.eta)
        check_positive('tol', self.tol)
        check_positive('adaptive_rho', self.adaptive_rho)
        check_positive('flatness_rho', self.flatness_rho)
        check_ascent(self.rho, self.ascent, self.steps)


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """The results of :func:`measure`; a measure that was not requested is None.

    Attributes:
        loss: L(w).
        gradient_norm: the L2 norm of the gradient.
        eigenvalues: the ``k`` largest eigenvalues of the Hessian, in descending order.
        trace: the estimated trace of the Hessian.
        trace_stderr: the standard error of the trace.
        sam_sharpness: the growth of the loss within ``rho``.
        adaptive_sharpness: the growth of the loss within ``adaptive_rho``, in units of the weights' magnitudes.
        first_order_flatness: ``flatness_rho`` times the largest gradient norm within ``flatness_rho``.
        samples: the number of samples over all ranks.
        seed: the seed of all random numbers.
        seconds: the wall-clock time.
    """

    loss: float | None = None
    gradient_norm: float | None = None
    eigenvalues: tuple[float, ...] | None = None
    trace: float | None = None
    trace_stderr: float | None = None
    sam_sharpness: float | None = None
    adaptive_sharpness: float | None = None
    first_order_flatness: float | None = None
    samples: int
    seed: int
    seconds: float

    @property
    def top_eigenvalue(self) -> float | None:
        """The largest eigenvalue."""
        return None if self.eigenvalues is None else self.eigenvalues[0]

    def as_dict(self) -> dict[str, float]:
        """Return the measured numbers by name; further eigenvalues are ``eigenvalue_2`` and so on."""
        further = {f'eigenvalue_{i}': value for i, value in enumerate((self.eigenvalues or ())[1:], start=2)}
        numbers: dict[str, float | None] = {
            'loss': self.loss,
            'gradient_norm': self.gradient_norm,
            'top_eigenvalue': self.top_eigenvalue,
            **further,
            'trace': self.trace,
            'trace_stderr': self.trace_stderr,
            'sam_sharpness': self.sam_sharpness,
            'adaptive_sharpness': self.adaptive_sharpness,
            'first_order_flatness': self.first_order_flatness,
            'samples': self.samples,
            'seed': self.seed,
            'seconds': self.seconds,
        }
        return {name: value for name, value in numbers.items() if value is not None}


@keywords_of(MeasureOptions)
def measure(
    model: nn.Module | Objective,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    *,
    measures: Sequence[str] = MEASURES,
    samples: int | None = None,
    microbatch: int | None = None,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Measurements:
    r"""Measure the loss of a model around its weights, each number as the function of its name defines it.

    Args:
        model: the model, or an :class:`~composer_sam.diagnostics.objective.Objective`, which replaces ``loss``,
            ``batches``, ``samples`` and ``microbatch``.
        loss: see :class:`~composer_sam.diagnostics.objective.Objective`.
        batches: the samples; they are read once for all measures.
        measures: a selection of ``MEASURES``.
        samples: the largest number of samples on each rank.
        microbatch: the largest number of samples in one graph.
        seed: the seed of all random numbers.
        progress: count the Hessian products of the eigenvalues on stderr.
        options: the fields of :class:`MeasureOptions`.

    Cost:
        With the defaults about 60 Hessian products and 65 passes. The Hessian takes two thirds of the time.

    Raises:
        ValueError: an unknown measure, or what the functions refuse.
        NotConvergedError: the eigenvalues did not converge.
        ModuleNotFoundError: eigenvalues are requested and SciPy is not installed.

    Example:
        >>> import torch
        >>> from composer_sam.diagnostics import measure
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> batches = [(torch.ones(2, 1), torch.ones(2, 1))]                    # L = (w - 1)^2
        >>> found = measure(model, torch.nn.functional.mse_loss, batches, measures=['loss', 'top_eigenvalue'])
        >>> found.loss, found.top_eigenvalue, found.samples
        (4.0, 2.0, 2)
    """
    check_measures(measures)
    checked = MeasureOptions(**options)
    began = time.perf_counter()
    objective = Objective.of(model, loss, batches, samples=samples, microbatch=microbatch)
    found = measure_objective(objective, measures, checked, seed=seed, progress=progress)
    return dataclasses.replace(found, seconds=time.perf_counter() - began)  # with the time to read the samples


def measure_objective(
    objective: Objective,
    measures: Sequence[str],
    options: MeasureOptions,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Measurements:
    """Measure an objective with options that are checked already; see :func:`measure`.

    Args:
        objective: the loss as a function of the weights.
        measures: a selection of ``MEASURES``.
        options: the options of the measures.
        seed: the seed of all random numbers.
        progress: count the Hessian products of the eigenvalues on stderr.
    """
    began = time.perf_counter()
    loss = gradient_norm = eigenvalues = estimate = sharpness = adaptive = flatness = None
    with objective.undisturbed():
        if 'gradient_norm' in measures:
            loss, gradient = objective.value_and_gradient()
            gradient_norm = float(norm(objective.vector(gradient)))
        elif 'loss' in measures:
            loss = objective.value()
        if 'top_eigenvalue' in measures:
            eigenvalues = top_eigenvalues(objective, k=options.k, tol=options.tol, seed=seed, progress=progress).values
        if 'trace' in measures:
            estimate = trace(objective, estimator='hutch++', probes=options.probes, seed=seed)
        if 'sam_sharpness' in measures:
            sharpness = sam_sharpness(
                objective, rho=options.rho, ascent=options.ascent, steps=options.steps, seed=seed
            ).value
        if 'adaptive_sharpness' in measures:
            adaptive = adaptive_sharpness(
                objective,
                rho=options.adaptive_rho,
                eta=options.eta,
                ascent=options.ascent,
                steps=options.steps,
                seed=seed,
            ).value
        if 'first_order_flatness' in measures:
            flatness = first_order_flatness(
                objective, rho=options.flatness_rho, ascent=options.ascent, steps=options.steps, seed=seed
            ).value
    return Measurements(
        loss=loss if 'loss' in measures else None,
        gradient_norm=gradient_norm,
        eigenvalues=eigenvalues,
        trace=None if estimate is None else estimate.value,
        trace_stderr=None if estimate is None else estimate.stderr,
        sam_sharpness=sharpness,
        adaptive_sharpness=adaptive,
        first_order_flatness=flatness,
        samples=objective.samples,
        seed=seed,
        seconds=time.perf_counter() - began,
    )


def check_measures(measures: Sequence[str]) -> None:
    """Raise ValueError for anything but a selection of ``MEASURES``."""
    unknown = [name for name in measures if name not in MEASURES]
    if isinstance(measures, str) or not measures or unknown:
        raise ValueError(f'measures must be some of {", ".join(map(repr, MEASURES))}, got {measures!r}')

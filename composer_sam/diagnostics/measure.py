"""All measures of one model at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from composer_sam.diagnostics.ascent import check_ascent, check_eta
from composer_sam.diagnostics.checks import Loss, check_at_least, check_positive
from composer_sam.diagnostics.hessian import top_eigenvalues, trace
from composer_sam.diagnostics.objective import Objective
from composer_sam.diagnostics.sharpness import adaptive_sharpness, first_order_flatness, sam_sharpness
from composer_sam.vectors import norm

__all__ = ['MEASURES', 'Measurements', 'check_options', 'measure']

MEASURES = (
    'loss',
    'gradient_norm',
    'top_eigenvalue',
    'trace',
    'sam_sharpness',
    'adaptive_sharpness',
    'first_order_flatness',
)


@dataclass(frozen=True)
class Measurements:
    """What was measured, None what was not asked for; the arguments are those of :func:`measure`.

    Attributes:
        loss: L(w).
        gradient_norm: the L2 norm of its gradient.
        eigenvalues: the largest of the Hessian, descending.
        trace: of the Hessian.
        trace_stderr: its standard error.
        sam_sharpness: the growth of the loss within ``rho``.
        adaptive_sharpness: the same within ``adaptive_rho`` in the scale of the weights.
        first_order_flatness: ``flatness_rho`` times the largest gradient norm within it.
        samples: over all ranks.
        seed: of everything random.
        seconds: of wall time.
    """

    loss: float | None
    gradient_norm: float | None
    eigenvalues: tuple[float, ...] | None
    trace: float | None
    trace_stderr: float | None
    sam_sharpness: float | None
    adaptive_sharpness: float | None
    first_order_flatness: float | None
    samples: int
    seed: int
    seconds: float

    @property
    def top_eigenvalue(self) -> float | None:
        return None if self.eigenvalues is None else self.eigenvalues[0]

    def as_dict(self) -> dict[str, float]:
        """Numbers by name, only those measured; further eigenvalues as ``eigenvalue_2`` and so on."""
        eigenvalues = {
            'top_eigenvalue' if place == 1 else f'eigenvalue_{place}': value
            for place, value in enumerate(self.eigenvalues or (), start=1)
        }
        fields: dict[str, Any] = {**vars(self), 'eigenvalues': None}
        before, after = ('loss', 'gradient_norm'), ('eigenvalues', 'loss', 'gradient_norm')
        ordered = {name: fields[name] for name in before} | eigenvalues
        ordered |= {name: value for name, value in fields.items() if name not in after}
        return {name: value for name, value in ordered.items() if value is not None}


def measure(
    model: nn.Module | Objective,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    *,
    measures: Sequence[str] = MEASURES,
    k: int = 1,
    probes: int = 30,
    rho: float = 0.05,
    adaptive_rho: float = 0.5,
    eta: float = 0.01,
    flatness_rho: float = 0.2,
    ascent: str = 'projected',
    steps: int = 20,
    samples: int | None = None,
    microbatch: int | None = None,
    seed: int = 0,
    tol: float = 1e-3,
    progress: bool = False,
) -> Measurements:
    r"""Measure a model's loss around its weights, each number as the function of its name defines it.

    Args:
        model: the model, or an :class:`~composer_sam.diagnostics.objective.Objective`, which stands for ``loss``,
            ``batches``, ``samples`` and ``microbatch``.
        loss: see :class:`~composer_sam.diagnostics.objective.Objective`.
        batches: the samples; read once for all measures.
        measures: which, of ``MEASURES``.
        k: how many eigenvalues, :math:`\ge 1`.
        probes: Hessian products for the trace by Hutch++, :math:`\ge 6`.
        rho: radius of :func:`~composer_sam.diagnostics.sharpness.sam_sharpness`, > 0.
        adaptive_rho: radius of :func:`~composer_sam.diagnostics.sharpness.adaptive_sharpness`, > 0.
        eta: its :math:`\eta \ge 0`.
        flatness_rho: radius of :func:`~composer_sam.diagnostics.sharpness.first_order_flatness`, > 0.
        ascent: ``'projected'`` or ``'first_order'``, for the last three measures.
        steps: evaluations of each projected ascent, :math:`\ge 0`.
        samples: at most so many samples on each rank.
        microbatch: samples per graph.
        seed: of everything random.
        tol: of the eigenvalues, > 0.
        progress: count the eigenvalues' Hessian products on stderr.

    Cost:
        With the defaults about 60 Hessian products and 65 passes, two thirds of the time for the Hessian.

    Raises:
        ValueError: an unknown measure, or what the functions refuse.
        NotConvergedError: the eigenvalues did not converge.

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
    radii = {'rho': rho, 'adaptive_rho': adaptive_rho, 'flatness_rho': flatness_rho}
    check_options(measures, k=k, probes=probes, eta=eta, ascent=ascent, steps=steps, tol=tol, **radii)
    began = time.perf_counter()
    objective = Objective.of(model, loss, batches, samples=samples, microbatch=microbatch)
    found: dict[str, Any] = {}
    ascents: dict[str, Any] = {'ascent': ascent, 'steps': steps, 'seed': seed}
    with objective.undisturbed():
        if 'gradient_norm' in measures:
            value, gradient = objective.value_and_gradient()
            found |= {'loss': value, 'gradient_norm': float(norm(objective.vector(gradient)))}
        if 'loss' in measures and 'gradient_norm' not in measures:
            found['loss'] = objective.value()
        if 'top_eigenvalue' in measures:
            found['eigenvalues'] = top_eigenvalues(objective, k=k, tol=tol, seed=seed, progress=progress).values
        if 'trace' in measures:
            estimate = trace(objective, estimator='hutch++', probes=probes, seed=seed)
            found |= {'trace': estimate.value, 'trace_stderr': estimate.stderr}
        if 'sam_sharpness' in measures:
            found['sam_sharpness'] = sam_sharpness(objective, rho=rho, **ascents).value
        if 'adaptive_sharpness' in measures:
            found['adaptive_sharpness'] = adaptive_sharpness(objective, rho=adaptive_rho, eta=eta, **ascents).value
        if 'first_order_flatness' in measures:
            found['first_order_flatness'] = first_order_flatness(objective, rho=flatness_rho, **ascents).value
    names = Measurements.__dataclass_fields__
    values = dict.fromkeys(names) | found | {'samples': objective.samples, 'seed': seed}
    if 'loss' not in measures:
        values['loss'] = None
    return Measurements(**{**values, 'seconds': time.perf_counter() - began})


def check_options(
    measures: Sequence[str],
    *,
    k: int,
    probes: int,
    eta: float,
    ascent: str,
    steps: int,
    tol: float,
    rho: float,
    adaptive_rho: float,
    flatness_rho: float,
) -> None:
    """Raise ValueError for what :func:`measure` would refuse whatever the model is."""
    unknown = [repr(name) for name in measures if name not in MEASURES]
    if isinstance(measures, str) or not measures or unknown:
        raise ValueError(f'measures must be some of {", ".join(map(repr, MEASURES))}, got {measures!r}')
    check_at_least('k', k, 1)
    check_at_least('probes', probes, 6)
    check_eta(eta)
    check_positive('tol', tol)
    check_positive('adaptive_rho', adaptive_rho)
    check_positive('flatness_rho', flatness_rho)
    check_ascent(rho, ascent, steps)

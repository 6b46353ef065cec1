"""What a trained network's loss looks like around its weights: pure functions of (model, loss, batches)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from composer_sam.diagnostics.geometry import GradientGeometry, gradient_geometry
from composer_sam.diagnostics.hessian import (
    Eigenvalues,
    SpectralDensity,
    Trace,
    spectral_density,
    top_eigenvalues,
    trace,
)
from composer_sam.diagnostics.measure import MEASURES, Measurements, measure
from composer_sam.diagnostics.objective import Objective
from composer_sam.diagnostics.sharpness import (
    AverageSharpness,
    Flatness,
    Sharpness,
    adaptive_sharpness,
    average_sharpness,
    first_order_flatness,
    sam_sharpness,
)

if TYPE_CHECKING:
    from composer_sam.diagnostics.geometry_monitor import GradientGeometryMonitor
    from composer_sam.diagnostics.monitor import SharpnessMonitor

__all__ = [
    'MEASURES',
    'AverageSharpness',
    'Eigenvalues',
    'Flatness',
    'GradientGeometry',
    'GradientGeometryMonitor',
    'Measurements',
    'Objective',
    'Sharpness',
    'SharpnessMonitor',
    'SpectralDensity',
    'Trace',
    'adaptive_sharpness',
    'average_sharpness',
    'first_order_flatness',
    'gradient_geometry',
    'measure',
    'sam_sharpness',
    'spectral_density',
    'top_eigenvalues',
    'trace',
]


def __getattr__(name: str) -> Any:
    # Imported on first use: all else here works without Composer, which takes seconds to import.
    if name == 'SharpnessMonitor':
        from composer_sam.diagnostics.monitor import SharpnessMonitor

        return SharpnessMonitor
    if name == 'GradientGeometryMonitor':
        from composer_sam.diagnostics.geometry_monitor import GradientGeometryMonitor

        return GradientGeometryMonitor
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

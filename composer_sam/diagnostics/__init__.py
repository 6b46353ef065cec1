"""Measures of the loss around the weights of a network: pure functions of (model, loss, batches)."""

from __future__ import annotations

from composer_sam.diagnostics.damage import noisy, quantized
from composer_sam.diagnostics.geometry import GradientGeometry, gradient_geometry
from composer_sam.diagnostics.hessian import (
    Eigenvalues,
    SpectralDensity,
    Trace,
    spectral_density,
    top_eigenvalues,
    trace,
)
from composer_sam.diagnostics.measure import MEASURES, Measurements, MeasureOptions, measure
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

__all__ = [
    'MEASURES',
    'AverageSharpness',
    'Eigenvalues',
    'Flatness',
    'GradientGeometry',
    'MeasureOptions',
    'Measurements',
    'Objective',
    'Sharpness',
    'SpectralDensity',
    'Trace',
    'adaptive_sharpness',
    'average_sharpness',
    'first_order_flatness',
    'gradient_geometry',
    'measure',
    'noisy',
    'quantized',
    'sam_sharpness',
    'spectral_density',
    'top_eigenvalues',
    'trace',
]

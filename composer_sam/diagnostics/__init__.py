"""What a trained network's loss looks like around its weights: pure functions of (model, loss, batches)."""

from __future__ import annotations

from composer_sam.diagnostics.hessian import (
    Eigenvalues,
    SpectralDensity,
    Trace,
    spectral_density,
    top_eigenvalues,
    trace,
)
from composer_sam.diagnostics.objective import Objective

__all__ = ['Eigenvalues', 'Objective', 'SpectralDensity', 'Trace', 'spectral_density', 'top_eigenvalues', 'trace']

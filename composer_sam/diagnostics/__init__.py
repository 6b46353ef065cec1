"""What a trained network's loss looks like around its weights: pure functions of (model, loss, batches)."""

from __future__ import annotations

from composer_sam.diagnostics.objective import Objective

__all__ = ['Objective']

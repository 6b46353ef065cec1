"""Lightning's Trainer as the host: a callback that makes automatic optimization sharpness-aware."""

from __future__ import annotations

from composer_sam.trainers.lightning.callback import SharpnessAware

__all__ = ['SharpnessAware']

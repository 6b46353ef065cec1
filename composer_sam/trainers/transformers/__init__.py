"""Hugging Face's Trainer: sharpness-aware steps under it, and under trainers that extend it."""

from __future__ import annotations

from composer_sam.extras import extra

with extra('transformers', __name__):
    import accelerate  # pyright: ignore  # noqa: F401 - transformers itself does not say that its Trainer needs it

    from composer_sam.trainers.transformers.trainer import SharpnessAwareMixin, SharpnessAwareTrainer

__all__ = ['SharpnessAwareMixin', 'SharpnessAwareTrainer']

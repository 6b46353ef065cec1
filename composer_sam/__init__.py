"""Sharpness-aware training for MosaicML Composer and plain PyTorch."""

from composer_sam.methods import SAM, registry
from composer_sam.optimizer import SharpnessAwareOptimizer
from composer_sam.version import __version__

__all__ = ['SAM', 'SharpnessAwareOptimizer', '__version__', 'registry']

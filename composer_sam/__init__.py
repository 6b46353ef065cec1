"""Sharpness-aware training for MosaicML Composer and plain PyTorch."""

from composer_sam.methods import ASAM, GAM, SAM, WSAM, SAMDirection, SAMMagnitude, SGDHess, registry
from composer_sam.optimizer import SharpnessAwareOptimizer
from composer_sam.version import __version__

__all__ = [
    'ASAM',
    'GAM',
    'SAM',
    'WSAM',
    'SAMDirection',
    'SAMMagnitude',
    'SGDHess',
    'SharpnessAwareOptimizer',
    '__version__',
    'registry',
]

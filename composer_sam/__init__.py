"""Sharpness-aware training for MosaicML Composer and plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from composer_sam.version import __version__

if TYPE_CHECKING:
    from composer_sam.methods import ASAM, GAM, SAM, WSAM, SAMDirection, SAMMagnitude, SGDHess, registry
    from composer_sam.optimizer import SharpnessAwareOptimizer

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


def __getattr__(name: str) -> Any:
    # Imported on first use: Composer takes seconds to import, and `composer-sam --help` does not need it.
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from composer_sam import methods, optimizer

    return getattr(optimizer if name == 'SharpnessAwareOptimizer' else methods, name)

"""Sharpness-aware training for plain PyTorch and MosaicML Composer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from composer_sam.version import __version__

if TYPE_CHECKING:
    from composer_sam.engine.optimizer import SharpnessAwareOptimizer
    from composer_sam.methods import (
        AESAM,
        ASAM,
        CRSAM,
        DPSAT,
        GAM,
        GNP,
        GSAM,
        MSAM,
        SAGM,
        SAM,
        USAM,
        WSAM,
        FisherSAM,
        FriendlySAM,
        FunctionalSAM,
        LookSAM,
        RandomSAM,
        SAMDirection,
        SAMMagnitude,
        SGDHess,
        VaSSO,
        registry,
    )
    from composer_sam.trainers.any_loop import LoopOptimizer
    from composer_sam.trainers.composer import GradientGeometryMonitor, SharpnessMonitor

__all__ = [
    'AESAM',
    'ASAM',
    'CRSAM',
    'DPSAT',
    'GAM',
    'GNP',
    'GSAM',
    'MSAM',
    'SAGM',
    'SAM',
    'USAM',
    'WSAM',
    'FisherSAM',
    'FriendlySAM',
    'FunctionalSAM',
    'GradientGeometryMonitor',
    'LookSAM',
    'LoopOptimizer',
    'RandomSAM',
    'SAMDirection',
    'SAMMagnitude',
    'SGDHess',
    'SharpnessAwareOptimizer',
    'SharpnessMonitor',
    'VaSSO',
    '__version__',
    'registry',
]

_ELSEWHERE = {
    'SharpnessAwareOptimizer': 'composer_sam.engine.optimizer',
    'LoopOptimizer': 'composer_sam.trainers.any_loop',
    'GradientGeometryMonitor': 'composer_sam.trainers.composer',  # these two need Composer
    'SharpnessMonitor': 'composer_sam.trainers.composer',
}


def __getattr__(name: str) -> Any:
    # Imported on first use: torch takes seconds to import, and `composer-sam --help` does not need it.
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(_ELSEWHERE.get(name, 'composer_sam.methods')), name)

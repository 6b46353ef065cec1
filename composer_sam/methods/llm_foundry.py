"""The methods for LLM Foundry's registry of algorithms, which takes subclasses of Composer's ``Algorithm`` only.

The entry points ``llmfoundry_algorithms`` in ``pyproject.toml`` name the methods here and not in their own modules:
importing this module imports Composer and registers all methods, those of your own too, as subclasses of ``Algorithm``.
"""

from __future__ import annotations

from composer_sam.methods import registry
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.composer_protocol import ComposerAlgorithm
from composer_sam.trainers.composer import attach

__all__: list[str] = []  # the methods are public in composer_sam

attach.register(ComposerAlgorithm)


def __getattr__(name: str) -> type[SharpnessAware]:
    if name not in registry:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return registry[name]

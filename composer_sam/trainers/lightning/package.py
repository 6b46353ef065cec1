"""Lightning, in the copy that the user has imported."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from composer_sam.extras import extra

__all__ = ['Metric', 'pl']


def _lightning() -> Any:
    """Return ``lightning.pytorch``, or the older package of the same code if only that one is imported already."""
    older = 'pytorch_lightning' in sys.modules and 'lightning.pytorch' not in sys.modules
    return importlib.import_module('pytorch_lightning' if older else 'lightning.pytorch')


with extra('lightning', 'composer_sam.trainers.lightning'):
    pl = _lightning()
    from torchmetrics import Metric

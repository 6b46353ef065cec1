"""The methods, one file each, and the registry through which tests, tables and recipes find them."""

from __future__ import annotations

from composer_sam.algorithm import SharpnessAware
from composer_sam.methods.asam import ASAM
from composer_sam.methods.gam import GAM
from composer_sam.methods.sam import SAM
from composer_sam.methods.sam_direction import SAMDirection
from composer_sam.methods.sam_magnitude import SAMMagnitude
from composer_sam.methods.sgd_hess import SGDHess
from composer_sam.methods.wsam import WSAM

__all__ = ['ASAM', 'GAM', 'SAM', 'WSAM', 'SAMDirection', 'SAMMagnitude', 'SGDHess', 'registry', 'table']

registry: dict[str, type[SharpnessAware]] = {
    method.__name__: method for method in (SAM, ASAM, WSAM, GAM, SAMDirection, SAMMagnitude, SGDHess)
}


def table() -> list[dict[str, str]]:
    """One row per method: its name, the passes of a perturbing step, its memory at the peak, and its paper."""
    return [
        {
            'name': name,
            'passes': str(method().passes),
            'extra_memory': f'{method.extra_copies} x parameters',
            'paper': method.paper,
        }
        for name, method in registry.items()
    ]

"""The methods, one file each, and the registry through which tests, tables and recipes find them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from composer_sam.engine.counting import count
from composer_sam.methods.asam import ASAM
from composer_sam.methods.base import SharpnessAware
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


def table() -> list[dict[str, Any]]:
    """Return one row per method.

    ``passes`` and ``collectives`` (exchanges of gradients over ranks under DistributedDataParallel) are those of a
    perturbed step, counted on the rule itself. ``extra_copies`` is what the step adds to the base step's peak memory,
    in copies of the parameters. ``hyperparameters`` are the method's own, by name, with their defaults.
    """
    return [_table_row(name, method) for name, method in registry.items()]


def _table_row(name: str, method: type[SharpnessAware]) -> dict[str, Any]:
    return {
        'name': name,
        'summary': (inspect.getdoc(method) or '').splitlines()[0],
        'passes': method().passes,
        'collectives': count(method()).collectives,
        'extra_copies': method.extra_copies,
        'hyperparameters': {field.name: field.default for field in own_fields(method)},
        'paper': method.paper,
    }


def own_fields(method: type[SharpnessAware]) -> list[dataclasses.Field[Any]]:
    """Return the hyper-parameters that a method declares itself, without those that all methods have."""
    shared = {field.name for field in dataclasses.fields(SharpnessAware)}
    return [field for field in dataclasses.fields(method) if field.name not in shared]

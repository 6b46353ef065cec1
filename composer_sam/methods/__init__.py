"""The methods, one file each, and the registry through which tests, tables and recipes find them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from composer_sam.engine.counting import count
from composer_sam.methods.aesam import AESAM
from composer_sam.methods.asam import ASAM
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.crsam import CRSAM
from composer_sam.methods.dp_sat import DPSAT
from composer_sam.methods.fisher_sam import FisherSAM
from composer_sam.methods.friendly_sam import FriendlySAM
from composer_sam.methods.functional_sam import FunctionalSAM
from composer_sam.methods.gam import GAM
from composer_sam.methods.gnp import GNP
from composer_sam.methods.gsam import GSAM
from composer_sam.methods.look_sam import LookSAM
from composer_sam.methods.msam import MSAM
from composer_sam.methods.random_sam import RandomSAM
from composer_sam.methods.sagm import SAGM
from composer_sam.methods.sam import SAM
from composer_sam.methods.sam_direction import SAMDirection
from composer_sam.methods.sam_magnitude import SAMMagnitude
from composer_sam.methods.sgd_hess import SGDHess
from composer_sam.methods.usam import USAM
from composer_sam.methods.vasso import VaSSO
from composer_sam.methods.wsam import WSAM

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
    'LookSAM',
    'RandomSAM',
    'SAMDirection',
    'SAMMagnitude',
    'SGDHess',
    'VaSSO',
    'registry',
    'table',
]

registry: dict[str, type[SharpnessAware]] = {
    method.__name__: method
    for method in (
        SAM,
        ASAM,
        GSAM,
        FriendlySAM,
        VaSSO,
        FisherSAM,
        USAM,
        FunctionalSAM,
        WSAM,
        GNP,
        SAGM,
        CRSAM,
        GAM,
        MSAM,
        DPSAT,
        LookSAM,
        AESAM,
        RandomSAM,
        SAMDirection,
        SAMMagnitude,
        SGDHess,
    )
}


_GROUPS = ('One pass', 'Two passes, or one or two', 'More passes', 'Building blocks of studies')


def table() -> list[dict[str, Any]]:
    """Return one row per method, in the order of their groups.

    ``group`` is what the method's price is, or that it is for studies. ``passes`` (a range like 1-2 where steps differ)
    and ``collectives`` (exchanges of gradients over ranks under DistributedDataParallel, the most that a step takes)
    are those of a perturbed step, counted on the rule itself; ``cost`` is the average number of passes, times the base
    step's one. ``extra_copies`` is what the step adds to the base step's peak memory, in copies of the parameters, and
    ``held`` what lies in the optimizer's state between steps. ``hyperparameters`` are the method's own, by name, with
    their defaults.
    """
    rows = [_table_row(name, method) for name, method in registry.items()]
    return sorted(rows, key=lambda row: _GROUPS.index(row['group']))


def _table_row(name: str, method: type[SharpnessAware]) -> dict[str, Any]:
    made = method()
    return {
        'group': _group(made),
        'name': name,
        'summary': (inspect.getdoc(method) or '').splitlines()[0],
        'when': method.when,
        'passes': _passes(made),
        'cost': _cost(made),
        'collectives': count(made).collectives,
        'extra_copies': method.extra_copies,
        'held': _held(method),
        'hyperparameters': {field.name: field.default for field in own_fields(method)},
        'paper': method.paper,
    }


def _group(method: SharpnessAware) -> str:
    return _GROUPS[3 if method.for_studies else min(method.passes, 3) - 1]


def _passes(method: SharpnessAware) -> str:
    return f'{method.fewest_passes}-{method.passes}' if method.fewest_passes < method.passes else f'{method.passes}'


def _cost(method: SharpnessAware) -> str:
    mean = _passes(method) if method.mean_passes is None else f'{method.mean_passes:.2g}'
    return f'{mean}x + Hv' if method.backwards_create_graph else f'{mean}x'


def _held(method: type[SharpnessAware]) -> str:
    held = [f'{method.held_copies} x weights'] * bool(method.held_copies)
    held += [f'{len(method.held_numbers)} numbers'] * bool(method.held_numbers)
    return ' and '.join(held) or 'nothing'


def own_fields(method: type[SharpnessAware]) -> list[dataclasses.Field[Any]]:
    """Return the hyper-parameters that a method declares itself, without those that all methods have."""
    shared = {field.name for field in dataclasses.fields(SharpnessAware)}
    return [field for field in dataclasses.fields(method) if field.name not in shared]

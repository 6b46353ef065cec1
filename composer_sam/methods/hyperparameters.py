"""Declarations of hyper-parameters with their ranges, and checks of their values."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from composer_sam.vectors import Number, PerParameter

__all__ = [
    'Range',
    'check_count',
    'check_field',
    'choice',
    'hyperparameter',
    'numeric',
    'per_parameter',
]


@dataclasses.dataclass(frozen=True)
class Range:
    """The values a numeric hyper-parameter may have.

    Args:
        gt: exclusive lower bound.
        ge: inclusive lower bound.
        lt: exclusive upper bound.
        le: inclusive upper bound.
        per_group: whether parameter groups may set their own value.
    """

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    per_group: bool = True

    @property
    def bounds(self) -> tuple[tuple[str, float], ...]:
        """Every bound with its sign."""
        signs = (('>', self.gt), ('>=', self.ge), ('<', self.lt), ('<=', self.le))
        return tuple((sign, bound) for sign, bound in signs if bound is not None)

    def check(self, name: str, value: object) -> float:
        """Return the value as a number.

        Raises:
            ValueError: the value is not a finite number within the bounds.
        """
        size = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
        if (
            not math.isfinite(size)
            or (self.gt is not None and size <= self.gt)
            or (self.ge is not None and size < self.ge)
            or (self.lt is not None and size >= self.lt)
            or (self.le is not None and size > self.le)
        ):
            bounds = ' and '.join(f'{sign} {bound:g}' for sign, bound in self.bounds)
            raise ValueError(f'{name} must be {" ".join(["a finite number", bounds]).strip()}, got {value!r}')
        return size


def hyperparameter(
    default: Any,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    per_group: bool = True,
) -> Any:
    """Declare a method's numeric hyper-parameter.

    Args:
        default: its default; None means that None is allowed.
        gt: exclusive lower bound.
        ge: inclusive lower bound.
        lt: exclusive upper bound.
        le: inclusive upper bound.
        per_group: whether parameter groups may set their own value.
    """
    return dataclasses.field(default=default, metadata={'range': Range(gt, ge, lt, le, per_group)})


def choice(default: str, *others: str) -> Any:
    """Declare a hyper-parameter that is one of a few words."""
    return dataclasses.field(default=default, metadata={'choices': (default, *others)})


@functools.cache
def numeric(method: type[Any]) -> dict[str, Range]:
    """Return the numeric hyper-parameters of a method's class, with their ranges."""
    return {field.name: field.metadata['range'] for field in dataclasses.fields(method) if 'range' in field.metadata}


def check_field(field: dataclasses.Field[Any], value: object) -> None:
    """Check a declared hyper-parameter: its range, its choices, or that a flag is true or false."""
    if 'range' in field.metadata and not (value is None and field.default is None):
        field.metadata['range'].check(field.name, value)
    if 'choices' in field.metadata and value not in field.metadata['choices']:
        raise ValueError(f'{field.name} must be one of {", ".join(field.metadata["choices"])}, got {value!r}')
    if isinstance(field.default, bool) and not isinstance(value, bool):
        raise ValueError(f'{field.name} must be true or false, got {value!r}')


def check_count(name: str, value: object, least: int = 1) -> int:
    """Return the value as a number of steps, or as another integer.

    Raises:
        ValueError: the value is not an integer >= ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f'{name} must be an integer >= {least}, got {value!r}')
    return value


def per_parameter(name: str, allowed: Range, default: float, groups: Sequence[tuple[dict[str, Any], int]]) -> Number:
    """Return a hyper-parameter that groups set for themselves, as one number per parameter.

    Args:
        name: its name.
        allowed: its range.
        default: the value for groups that do not set it.
        groups: for each parameter group, its own values and its number of trainable parameters.
    """
    values: list[float] = []
    for own, count in groups:
        value = own.get(name, default)
        allowed.check(f'{name} of a parameter group', value)
        values += [value] * count
    return PerParameter(values)

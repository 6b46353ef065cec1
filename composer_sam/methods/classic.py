"""The call that people have from the classic implementation, ``SAM(model.parameters(), torch.optim.SGD, ...)``."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

__all__ = ['OfInit', 'check_not_classic']


class OfInit:
    """The signature of a class, read off its ``__init__``: ``inspect`` would take that of ``__new__``."""

    def __get__(self, instance: object, owner: type[Any]) -> inspect.Signature:
        signature = inspect.signature(owner.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def check_not_classic(method: type[Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Raise TypeError for a call with parameters or an optimizer, and say what to write instead.

    Args:
        method: the method's class.
        args: the positional arguments of the call.
        options: the keyword arguments of the call.
    """
    own = {field.name for field in dataclasses.fields(method)}
    foreign = {name: value for name, value in options.items() if name not in own}
    given = [*args, *foreign.values()]
    if not any(_is_parameters(value) or _is_optimizer(value) for value in given):
        return
    bases = [value for value in given if _is_optimizer(value)]
    base = bases[0] if bases else 'torch.optim.SGD'
    if isinstance(base, Optimizer):
        written = 'optimizer'
    else:
        name = base if isinstance(base, str) else getattr(base, '__qualname__', 'base_optimizer')
        module = getattr(base, '__module__', '')
        name = f'torch.optim.{name}' if module.startswith('torch.optim') else name
        rest = {k: v for k, v in foreign.items() if not _is_parameters(v) and not _is_optimizer(v)}
        written = f'{name}({", ".join(["model.parameters()", *_keywords(rest)])})'
    rule = f'{method.__name__}({", ".join(_keywords({k: v for k, v in options.items() if k in own}))})'
    raise TypeError(
        f'{method.__name__} is a method and takes no parameters and no optimizer: it goes around an optimizer that you '
        f'build. Write: SharpnessAwareOptimizer({written}, {rule}, model)'
    )


def _keywords(values: Mapping[str, Any]) -> list[str]:
    return [f'{name}={value!r}' for name, value in values.items()]


def _is_optimizer(value: object) -> bool:
    return isinstance(value, Optimizer) or (isinstance(value, type) and issubclass(value, Optimizer))


def _is_parameters(value: object) -> bool:
    """Whether the value is what an optimizer takes for its parameters: tensors, groups, or a generator of either."""
    if isinstance(value, Tensor) or inspect.isgenerator(value):
        return True
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        return False
    return any(isinstance(item, (Tensor, Mapping)) for item in cast(Iterable[object], value))

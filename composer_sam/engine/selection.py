"""The selection of the parameters that a method perturbs, and the names of parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor, nn

__all__ = ['Selection', 'check_selection', 'names_of', 'select']

# A regular expression, the word 'normalization', or a predicate of name and parameter.
Selection: TypeAlias = str | Callable[[str, Tensor], bool]

# Of torch's normalisation layers only BatchNorm and InstanceNorm have a common base class.
_NORMALIZATION = re.compile(r'(Batch|Layer|Group|Instance|RMS)Norm|LocalResponseNorm')


def check_selection(selection: object) -> None:
    """Raise ValueError if ``selection`` cannot choose parameters."""
    if isinstance(selection, str):
        try:
            re.compile(selection)
        except re.error as error:
            raise ValueError(f'parameters must be a regular expression, got {selection!r}: {error}') from error
    elif selection is not None and not callable(selection):
        raise ValueError(
            "parameters must be a regular expression, 'normalization' or a predicate of name and parameter, "
            f'got {selection!r}'
        )


def names_of(parameters: Sequence[Tensor], model: nn.Module | None, wanted_by: str) -> list[str]:
    """Return the parameters' names in the model.

    Raises:
        ValueError: there is no model, or FSDP1 has flattened parameters into one without a name.
    """
    if model is None:
        raise ValueError(f'{wanted_by} needs the names of parameters: pass model= to SharpnessAwareOptimizer')
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [known.get(id(parameter)) for parameter in parameters]
    if any(name is None or name.split('.')[-1] == '_flat_param' for name in names):
        raise ValueError(
            f'{wanted_by} needs the names of parameters, but some have no name in the model: '
            'pass the model that is trained, and wrap it with use_orig_params=True under FullyShardedDataParallel'
        )
    return [name for name in names if name is not None]


def select(selection: Selection, parameters: Sequence[Tensor], model: nn.Module | None) -> list[int]:
    """Return the indices of the parameters that ``selection`` chooses.

    Raises:
        ValueError: it chooses no parameter, or the names are unknown.
    """
    names = names_of(parameters, model, f'parameters={selection!r}')
    if selection == 'normalization' and model is not None:
        layers = [module for module in model.modules() if _NORMALIZATION.search(type(module).__name__)]
        members = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
        chosen = [place for place, parameter in enumerate(parameters) if id(parameter) in members]
    elif isinstance(selection, str):
        pattern = re.compile(selection)
        chosen = [place for place, name in enumerate(names) if pattern.search(name)]
    else:
        pairs = zip(names, parameters, strict=True)
        chosen = [place for place, (name, parameter) in enumerate(pairs) if selection(name, parameter)]
    if not chosen:
        raise ValueError(f'parameters={selection!r} chooses no parameter; their names are {", ".join(names[:8])}, ...')
    return chosen

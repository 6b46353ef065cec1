"""What a component takes, by the section and the name that a recipe gives it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from composer import Trainer
from pydantic_core import PydanticUndefined

from composer_sam.recipes.components import find
from composer_sam.recipes.errors import RecipeError
from composer_sam.recipes.models import plain_models
from composer_sam.recipes.own import PROVIDED, find_function
from composer_sam.recipes.schema import DATA, MODELS, DataSection, ModelSection

__all__ = ['COMPONENT_SECTIONS', 'NAMED_SECTIONS', 'REQUIRED', 'Parameters', 'parameters_of']

# Sections that map the name of a component to its arguments, and sections whose ``name`` is that of their component.
COMPONENT_SECTIONS = ('algorithms', 'callbacks', 'loggers')
NAMED_SECTIONS = ('data', 'model', 'optimizer', 'scheduler')
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameters:
    """The parameters of a component.

    Attributes:
        owner: what the component is called in messages.
        defaults: the defaults by name, REQUIRED for parameters without one.
        takes_any: whether it takes others too.
    """

    owner: str
    defaults: dict[str, Any]
    takes_any: bool = False


def parameters_of(section: str, name: Any) -> Parameters | None:
    """Return the parameters of a component, None if there is no such component."""
    try:
        if section == 'trainer':
            return _of(Trainer.__init__, 'Trainer', ('self',))
        if section in ('data', 'model'):
            return _of_section(section, name)
        found = find(section, name, section)
    except RecipeError:
        return None
    return _of(found, found.__name__, ('params',) if section == 'optimizer' else ())


def _of_section(section: str, name: Any) -> Parameters | None:
    if not isinstance(name, str):
        return None
    if ':' in name:
        function = _of(find_function(f'{section}.name', name), name, PROVIDED if section == 'model' else ())
        common = _fields(DataSection if section == 'data' else ModelSection)
        return Parameters(name, common | function.defaults, function.takes_any)
    known = DATA if section == 'data' else dict.fromkeys(plain_models(), ModelSection) | MODELS
    return Parameters(name, _fields(known[name])) if name in known else None


def _fields(section: type[DataSection] | type[ModelSection]) -> dict[str, Any]:
    defaults = {name: field.get_default() for name, field in section.model_fields.items() if name != 'name'}
    return {name: REQUIRED if default is PydanticUndefined else default for name, default in defaults.items()}


def _of(target: Callable[..., Any], owner: str, provided: tuple[str, ...]) -> Parameters:
    parameters = {name: p for name, p in inspect.signature(target).parameters.items() if name not in provided}
    named = {name: p.default for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return Parameters(owner, named, any(p.kind is p.VAR_KEYWORD for p in parameters.values()))

"""A Trainer that blames the component of a recipe whose code fails as training starts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from composer import Trainer
from composer.core import Callback
from torch import nn

from composer_sam.recipes.arguments import reason
from composer_sam.recipes.components import find
from composer_sam.recipes.errors import RecipeError
from composer_sam.recipes.schema import Recipe

__all__ = ['BlamingTrainer']


class BlamingTrainer(Trainer):
    """Composer's Trainer; an error in a component of the recipe, in the first step, is one about its key.

    Composer's components check some of their arguments when they are used first.

    Args:
        recipe: the recipe.
        arguments: the arguments of Composer's Trainer.

    Raises:
        RecipeError: a component fails, or Composer refuses the combination.
    """

    def __init__(self, recipe: Recipe, /, **arguments: Any) -> None:
        self._recipe = recipe
        try:
            with _blamed(recipe):
                super().__init__(**arguments)
        except RecipeError:
            raise
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise RecipeError(f'recipe: {error}') from error
        except (RuntimeError, KeyError) as error:
            if (difference := _difference(error, arguments['model'])) is None:
                raise
            key, place = ('load_path', recipe.load_path) if recipe.load_path else ('save_folder', recipe.save_folder)
            raise RecipeError(f'{key}: {place!r} holds the weights of another network: {difference}') from error

    def fit(self, *positional: Any, **arguments: Any) -> None:
        """Train.

        Raises:
            RecipeError: a component of the recipe failed in the first step.
        """
        first = self.state.timestamp.batch.value
        try:
            with _blamed(self._recipe):
                super().fit(*positional, **arguments)
        except RecipeError as error:
            # When a callback hears that the first step is done, the trainer has counted it.
            if self.state.timestamp.batch.value > first + 1 and error.__cause__ is not None:
                raise error.__cause__ from None
            raise


def _difference(error: Exception, model: nn.Module) -> str | None:
    """Return the first difference between a checkpoint's network and the model; None for errors about other things."""
    if isinstance(error, KeyError):  # of the state of the optimizer, which is loaded before the weights
        known = any(error.args == (name,) for name, _ in model.named_parameters())
        return f'it does not have {error.args[0]}' if known else None
    if not str(error).startswith('Error(s) in loading state_dict'):
        return None
    size = re.search(r'size mismatch for (\S+): .*?\[(.*?)\].*?\[(.*?)\]', str(error))
    if size is not None:
        return f'{size[1]} is [{size[2]}] there, and [{size[3]}] in the network of the recipe'
    named = re.search(r'(Missing|Unexpected) key\(s\) in state_dict: "(\S+)"', str(error))
    if named is None:
        return None
    return f'it does not have {named[2]}' if named[1] == 'Missing' else f'it has {named[2]}'


@contextmanager
def _blamed(recipe: Recipe) -> Iterator[None]:
    """Turn an error in the code of a component of the recipe into a RecipeError that names its key."""
    try:
        yield
    except (RecipeError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found = _component(error.__traceback__, _keys(recipe))
        # A callback that raises a RuntimeError ends the run on purpose, as NaNMonitor does.
        if found is None or (isinstance(error, RuntimeError) and issubclass(found[0], Callback)):
            raise
        section, name = found[1]
        arguments = getattr(recipe, section)[name] if name else getattr(recipe, section)
        given = ', '.join(f'{key}={value!r}' for key, value in arguments.items() if key != 'name')
        key = f'{section}.{name}' if name else section
        raise RecipeError(f'{key}: {reason(error)}{f" (given {given})" if given else ""}') from error


def _keys(recipe: Recipe) -> dict[type[Any], tuple[str, str]]:
    """Return the section and the name of every component, by class."""
    found: dict[type[Any], tuple[str, str]] = {}
    for section in ('algorithms', 'callbacks', 'loggers'):
        for name in getattr(recipe, section):
            found[find(section, name, section)] = section, name
    for section in ('optimizer', 'scheduler'):
        if 'name' in getattr(recipe, section):
            found[find(section, getattr(recipe, section)['name'], section)] = section, ''
    return found


def _component(
    trace: TracebackType | None, keys: Mapping[type[Any], tuple[str, str]]
) -> tuple[type[Any], tuple[str, str]] | None:
    """Return the component whose method is nearest to the error; None if a network or the Trainer is nearer."""
    owners: list[Any] = []
    while trace is not None:
        owners.append(trace.tb_frame.f_locals.get('self'))
        trace = trace.tb_next
    for owner in reversed(owners):
        if type(owner) in keys:
            return type(owner), keys[type(owner)]
        if isinstance(owner, (nn.Module, Trainer)):
            return None
    return None

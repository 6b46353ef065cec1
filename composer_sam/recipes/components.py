"""Finding the classes that a recipe names, and constructing them with the arguments it gives."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import torch
from composer import Trainer
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination
from composer.optim import ComposerScheduler
from composer.utils.parallelism import FSDP2Config, FSDPConfig, ParallelismConfig

import composer_sam.recipes.tensorboard
import composer_sam.trainers.composer
from composer_sam.methods import registry
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import numeric
from composer_sam.recipes.arguments import check_arguments, construct
from composer_sam.recipes.errors import RecipeError, unknown
from composer_sam.recipes.save_folder import folder_of
from composer_sam.recipes.schema import Arguments, Recipe
from composer_sam.recipes.tensorboard import TensorboardLogger

__all__ = [
    'Components',
    'available',
    'build_components',
    'build_optimizer',
    'build_parallelism',
    'find',
    'same_name',
    'trainer_arguments',
]

T = TypeVar('T')

# Arguments of the Trainer that are keys of a recipe; the section ``trainer`` takes all others.
_SET_BY_RECIPE = (
    'self',
    *('model', 'train_dataloader', 'eval_dataloader', 'optimizers', 'schedulers'),
    *('algorithms', 'callbacks', 'loggers', 'max_duration', 'eval_interval', 'run_name', 'seed'),
    *('load_path', 'save_folder', 'save_interval', 'autoresume'),
    *('parallelism_config', 'device', 'precision', 'device_train_microbatch_size'),
)
# The keys of a recipe for these arguments, where they are called something else.
_OTHERWISE = {
    'train_dataloader': 'data',
    'eval_dataloader': 'data',
    'optimizers': 'optimizer',
    'schedulers': 'scheduler',
    'parallelism_config': 'parallelism',
}


@dataclass(frozen=True)
class Components:
    """The components of a Trainer that do not depend on its model."""

    algorithms: list[Algorithm | SharpnessAware]
    callbacks: list[Callback]
    loggers: list[LoggerDestination]
    scheduler: ComposerScheduler | None


def build_components(recipe: Recipe) -> Components:
    """Construct the algorithms, callbacks, loggers and the scheduler of a recipe.

    Raises:
        RecipeError: an unknown name or argument, an argument that a constructor refuses, a component that is named
            twice, or two methods.
    """
    algorithms: list[Algorithm | SharpnessAware] = _build_section(
        'algorithms', recipe.algorithms, available('algorithms')
    )
    named = [
        name for name, built in zip(recipe.algorithms, algorithms, strict=True) if isinstance(built, SharpnessAware)
    ]
    if len(named) > 1:
        raise RecipeError(
            f'algorithms.{named[1]}: only one method can wrap the optimizer, and there is algorithms.{named[0]}; '
            f'keep one of them ({named[0]}: null removes an inherited one)'
        )
    destinations: list[LoggerDestination] = _build_section('loggers', recipe.loggers, available('loggers'))
    for destination in destinations:
        if isinstance(destination, TensorboardLogger) and destination.log_dir is None:
            destination.folder = folder_of(recipe)
    return Components(
        algorithms=algorithms,
        callbacks=_build_section('callbacks', recipe.callbacks, available('callbacks')),
        loggers=destinations,
        scheduler=_build_scheduler(recipe),
    )


def available(section: str) -> dict[str, type[Any]]:
    """Return the classes that a section of a recipe can name, by name."""
    if section == 'algorithms':
        return {**_classes(composer.algorithms, of=Algorithm), **registry}  # ours replace Composer's of the same name
    if section == 'callbacks':
        return _classes(composer.callbacks, composer_sam.trainers.composer, of=Callback)
    if section == 'loggers':
        return _classes(composer_sam.recipes.tensorboard, composer.loggers, of=LoggerDestination, suffix='Logger')
    if section == 'scheduler':
        return _schedulers()
    return _classes(torch.optim, composer.optim, of=torch.optim.Optimizer)


def find(key: str, name: Any, section: str) -> type[Any]:
    """Return the class that a section names; case, underscores and hyphens do not matter.

    Raises:
        RecipeError: at ``key``, there is none.
    """
    return _find(key, name, available(section))


def same_name(one: str, other: str) -> bool:
    """Return whether two names are spellings of one component."""
    return _canonical(one) == _canonical(other)


def build_optimizer(recipe: Recipe, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Construct the base optimizer of a recipe for the given parameters."""
    optimizer, arguments = _split_name('optimizer', recipe.optimizer, available('optimizer'))
    checked = check_arguments('optimizer', optimizer, arguments, provided=('params',))
    return construct('optimizer', optimizer, list(parameters), **checked)


def build_parallelism(recipe: Recipe) -> ParallelismConfig | None:
    """Construct the parallelism configuration of a recipe, None if the recipe has none."""
    configs: dict[str, type[FSDPConfig] | type[FSDP2Config]] = {'fsdp': FSDPConfig, 'fsdp2': FSDP2Config}
    built: dict[str, Any] = {}
    for name, arguments in recipe.parallelism.items():
        # FSDPConfig accepts any keyword, so the arguments are checked against its declared fields.
        known = {field.name for field in dataclasses.fields(configs[name]) if not field.name.startswith('_')}
        for argument, value in arguments.items():
            if argument not in known:
                raise unknown('key', f'parallelism.{name}.{argument}', value, argument, known)
        built[name] = construct(f'parallelism.{name}', configs[name], **arguments)
    return ParallelismConfig(**built) if built else None


def trainer_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the checked arguments of the section ``trainer``."""
    instead = {name: _OTHERWISE.get(name, name) for name in _SET_BY_RECIPE if name != 'self'}
    return check_arguments('trainer', Trainer.__init__, recipe.trainer, provided=_SET_BY_RECIPE, instead=instead)


def _build_section(section: str, given: Mapping[str, Arguments], known: Mapping[str, type[T]]) -> list[T]:
    """Construct the components of a section that maps names to arguments."""
    built: list[T] = []
    named: dict[type[T], str] = {}
    for name, arguments in given.items():
        key = f'{section}.{name}'
        component = _find(key, name, known)
        if component in named:
            raise RecipeError(f'{key}: names the same component as {section}.{named[component]}; keep one of them')
        named[component] = name
        built.append(_build_component(key, component, arguments))
    return built


def _build_component(key: str, component: type[T], arguments: Arguments) -> T:
    built: dict[str, Any] = {}
    if issubclass(component, SharpnessAware) and 'schedules' in arguments:
        built['schedules'] = _build_schedules(f'{key}.schedules', component, arguments['schedules'])
    given = {name: value for name, value in arguments.items() if name not in built}
    return construct(key, component, **check_arguments(key, component, given), **built)


def _build_schedules(key: str, method: type[SharpnessAware], schedules: Any) -> dict[str, ComposerScheduler]:
    """Construct the schedulers of hyper-parameters from ``{rho: {cosine_annealing: {t_max: 1dur}}}``."""
    example = 'such as {rho: {cosine_annealing: {t_max: 1dur}}}'
    if not isinstance(schedules, dict):
        raise RecipeError(f'{key}: must be a scheduler for each hyper-parameter, {example}, got {schedules!r}')
    known = list(numeric(method))
    built: dict[str, ComposerScheduler] = {}
    for hyperparameter, section in schedules.items():
        inner = f'{key}.{hyperparameter}'
        if hyperparameter not in known:
            raise unknown('hyper-parameter', inner, section, str(hyperparameter), known)
        if not isinstance(section, dict) or len(section) != 1:
            raise RecipeError(f'{inner}: must be one scheduler by name, {example}, got {section!r}')
        ((name, arguments),) = section.items()
        inner = f'{inner}.{name}'
        scheduler = _find(inner, name, _schedulers())
        if not isinstance(arguments, dict):
            raise RecipeError(f'{inner}: must be a mapping of its arguments, {{}} for none, got {arguments!r}')
        built[hyperparameter] = construct(inner, scheduler, **check_arguments(inner, scheduler, arguments))
    return built


def _build_scheduler(recipe: Recipe) -> ComposerScheduler | None:
    if not recipe.scheduler:
        return None
    scheduler, arguments = _split_name('scheduler', recipe.scheduler, _schedulers())
    return construct('scheduler', scheduler, **check_arguments('scheduler', scheduler, arguments))


def _schedulers() -> dict[str, type[ComposerScheduler]]:
    return _classes(composer.optim, of=ComposerScheduler, suffix='Scheduler')


def _split_name(key: str, section: Arguments, known: Mapping[str, type[T]]) -> tuple[type[T], Arguments]:
    """Return the class that the key ``name`` of a section names, and the other keys."""
    if 'name' not in section:
        raise RecipeError(f'{key}.name: is required; valid: {", ".join(sorted(known))}')
    found = _find(f'{key}.name', section['name'], known)
    return found, {name: value for name, value in section.items() if name != 'name'}


def _classes(*modules: ModuleType, of: type[T], suffix: str = '') -> dict[str, type[T]]:
    """Return the public subclasses of ``of`` in the modules by name without ``suffix``; the first module wins."""
    found: dict[str, type[T]] = {}
    for module in modules:
        for name in getattr(module, '__all__', dir(module)):
            member = getattr(module, name)
            if inspect.isclass(member) and issubclass(member, of) and member is not of:
                found.setdefault(name.removesuffix(suffix), member)
    return found


def _find(key: str, name: Any, known: Mapping[str, type[T]]) -> type[T]:
    """Return the class called ``name``; case, underscores and hyphens do not matter."""
    if not isinstance(name, str):
        raise RecipeError(f'{key}: must be a name, got {name!r}')
    for candidate, found in known.items():
        if _canonical(name) in (_canonical(candidate), _canonical(found.__name__)):
            return found
    raise unknown('name', key, name, name, known)


def _canonical(name: str) -> str:
    return name.replace('_', '').replace('-', '').lower()

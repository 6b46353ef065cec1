"""From a recipe to Composer's Trainer."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import torch
from composer import Trainer
from composer.core import Algorithm, Callback, TimeUnit, ensure_time
from composer.devices import DeviceCPU, DeviceGPU
from composer.loggers import LoggerDestination
from composer.optim import ComposerScheduler
from composer.utils import dist, format_name_with_dist, get_device, parse_uri, reproducibility
from composer.utils.parallelism import FSDP2Config, FSDPConfig, ParallelismConfig
from omegaconf import OmegaConf

import composer_sam.trainers.composer
from composer_sam.methods import registry
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import numeric
from composer_sam.recipes.components import check_arguments, check_time, classes, construct, find
from composer_sam.recipes.data import build_data
from composer_sam.recipes.errors import RecipeError, unknown
from composer_sam.recipes.load import load_mapping
from composer_sam.recipes.models import build_model, plain_models
from composer_sam.recipes.schema import Recipe, parse_recipe

__all__ = ['build_trainer', 'check_recipe', 'load_recipe']

# What a recipe says by keys of its own; anything else of the Trainer's can be given under ``trainer``.
_SET_BY_RECIPE = (
    'self',
    *('model', 'train_dataloader', 'eval_dataloader', 'optimizers', 'schedulers'),
    *('algorithms', 'callbacks', 'loggers', 'max_duration', 'eval_interval', 'run_name', 'seed'),
    *('load_path', 'save_folder', 'save_interval', 'autoresume'),
    *('parallelism_config', 'device', 'precision', 'device_train_microbatch_size'),
)


def load_recipe(
    path: str | Path,
    overlays: Sequence[str | Path] = (),
    overrides: Iterable[str] = (),
) -> Recipe:
    """Reads, merges and checks a recipe without building or training anything.

    Args:
        path: The recipe's YAML file.
        overlays: Further YAML files, each laid over what came before.
        overrides: ``dotted.key=value``, laid over everything.

    Raises:
        RecipeError: If any of it is not valid.
    """
    mapping = load_mapping(path, overlays, overrides)
    mapping.setdefault('name', Path(path).stem)
    recipe = parse_recipe(mapping, plain_models())
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: Recipe) -> None:
    """Checks everything that can be known to be wrong before any data is read.

    Components are constructed once and thrown away, as only their constructors know the range of their arguments.
    """
    _components(recipe)
    _optimizer(recipe, [torch.nn.Parameter(torch.zeros(1))])
    _trainer_arguments(recipe)
    _parallelism(recipe)
    for key in ('max_duration', 'eval_interval', 'save_interval'):
        check_time(key, getattr(recipe, key))
    if ensure_time(recipe.max_duration, TimeUnit.EPOCH).value <= 0:
        raise RecipeError(f'max_duration: {recipe.max_duration!r} must be longer than nothing')
    try:
        device = get_device(recipe.device)
    except ValueError as error:
        raise RecipeError(f'device: {recipe.device!r}: {error}') from None
    if isinstance(device, DeviceCPU) and recipe.precision != 'fp32':
        raise RecipeError(f"precision: {recipe.precision!r} does not run on the CPU; choose 'fp32'")
    if recipe.autoresume and recipe.save_folder is None:
        raise RecipeError('autoresume: true needs a save_folder to resume from')
    if recipe.load_path is not None and parse_uri(recipe.load_path)[0] == '' and not Path(recipe.load_path).exists():
        raise RecipeError(f'load_path: {recipe.load_path!r} does not exist')
    _check_save_folder(recipe)


def build_trainer(recipe: Recipe, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Builds the Trainer of a checked recipe; call its ``fit()`` to train.

    Where the recipe has a ``save_folder``, the recipe itself is saved there as ``config.yaml``.

    Args:
        recipe: What :func:`load_recipe` returned.
        callbacks: Further callbacks, beside those of the recipe.

    Raises:
        RecipeError: If the data cannot be read, the folder not be written, or Composer refuses the combination.
    """
    check_recipe(recipe)
    device = get_device(recipe.device)
    if dist.get_world_size() > 1:
        # Before the data: one process per node fetches it while the others wait.
        dist.initialize_dist(device)
    data = build_data(recipe.data, recipe.seed, pin_memory=isinstance(device, DeviceGPU))
    reproducibility.seed_all(recipe.seed)
    model = build_model(recipe.model, data.image_shape, data.num_classes)
    components = _components(recipe)
    folder = _save_folder(recipe)
    _make_folder(folder)
    trainer = construct(
        'recipe',
        Trainer,
        model=model,
        train_dataloader=data.train,
        eval_dataloader=data.test,
        optimizers=_optimizer(recipe, model.parameters()),
        schedulers=components['scheduler'],
        algorithms=components['algorithms'],
        callbacks=[*components['callbacks'], *callbacks],
        loggers=components['loggers'],
        max_duration=recipe.max_duration,
        eval_interval=recipe.eval_interval,
        run_name=recipe.run_name or recipe.name,
        load_path=recipe.load_path,
        save_folder=recipe.save_folder,
        save_interval=recipe.save_interval,
        autoresume=recipe.autoresume,
        parallelism_config=_parallelism(recipe),
        device=device,
        precision=recipe.precision,
        device_train_microbatch_size=recipe.device_train_microbatch_size,
        seed=recipe.seed,
        # A killed run leaves a checkpoint that is newer than the one it can be resumed from.
        **{'save_overwrite': recipe.autoresume, **_trainer_arguments(recipe)},
    )
    if folder is not None and dist.get_global_rank() == 0:
        _save_config(recipe, folder)
    return trainer


def _components(recipe: Recipe) -> dict[str, Any]:
    """Constructs algorithms, callbacks, loggers and scheduler."""
    available = {
        # Where Composer has a method of the same name, ours takes its place.
        'algorithms': classes(composer.algorithms, of=Algorithm) | registry,
        'callbacks': classes(composer.callbacks, of=Callback) | classes(composer_sam.trainers.composer, of=Callback),
        'loggers': classes(composer.loggers, of=LoggerDestination, suffix='Logger'),
    }
    built: dict[str, Any] = {}
    for section, candidates in available.items():
        named: dict[str, str] = {}
        built[section] = []
        for name, arguments in getattr(recipe, section).items():
            key = f'{section}.{name}'
            component = find(key, name, candidates)
            if other := named.get(component.__name__):
                raise RecipeError(f'{key}: names the same component as {section}.{other}; keep one of them')
            named[component.__name__] = name
            built[section].append(_component(key, component, arguments))
    methods = [
        name
        for name, algorithm in zip(recipe.algorithms, built['algorithms'], strict=True)
        if isinstance(algorithm, SharpnessAware)
    ]
    if len(methods) > 1:
        raise RecipeError(
            f'algorithms.{methods[1]}: only one method can wrap the optimizer, and there is algorithms.{methods[0]}; '
            f'keep one of them ({methods[0]}: null removes an inherited one)'
        )
    built['scheduler'] = None
    if recipe.scheduler:
        scheduler, arguments = _named('scheduler', recipe.scheduler, _schedulers())
        built['scheduler'] = construct(
            'scheduler',
            scheduler,
            **check_arguments('scheduler', scheduler, arguments),
        )
    return built


def _component(key: str, component: type, arguments: dict[str, Any]) -> Any:
    built = {}
    if issubclass(component, SharpnessAware) and 'schedules' in arguments:
        built['schedules'] = _schedules(f'{key}.schedules', component, arguments['schedules'])
    given = {name: value for name, value in arguments.items() if name not in built}
    return construct(key, component, **check_arguments(key, component, given), **built)


def _schedules(key: str, method: type[SharpnessAware], schedules: Any) -> dict[str, Any]:
    """Constructs what a method's hyper-parameters follow: ``{rho: {cosine_annealing: {t_max: 1dur}}}``."""
    example = 'such as {rho: {cosine_annealing: {t_max: 1dur}}}'
    if not isinstance(schedules, dict):
        raise RecipeError(f'{key}: must be a scheduler for each hyper-parameter, {example}, got {schedules!r}')
    known = list(numeric(method))
    built = {}
    for hyperparameter, section in schedules.items():
        inner = f'{key}.{hyperparameter}'
        if hyperparameter not in known:
            raise unknown('hyper-parameter', inner, section, str(hyperparameter), known)
        if not isinstance(section, dict) or len(section) != 1:
            raise RecipeError(f'{inner}: must be one scheduler by name, {example}, got {section!r}')
        ((name, arguments),) = section.items()
        inner = f'{inner}.{name}'
        scheduler = find(inner, name, _schedulers())
        if not isinstance(arguments, dict):
            raise RecipeError(f'{inner}: must be a mapping of its arguments, {{}} for none, got {arguments!r}')
        built[hyperparameter] = construct(inner, scheduler, **check_arguments(inner, scheduler, arguments))
    return built


def _schedulers() -> dict[str, type]:
    return classes(composer.optim, of=ComposerScheduler, suffix='Scheduler')


def _optimizer(recipe: Recipe, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    optimizers = classes(torch.optim, composer.optim, of=torch.optim.Optimizer)
    optimizer, arguments = _named('optimizer', recipe.optimizer, optimizers)
    checked = check_arguments('optimizer', optimizer, arguments, provided=('params',))
    return construct('optimizer', optimizer, list(parameters), **checked)


def _named(key: str, section: dict[str, Any], available: dict[str, type]) -> tuple[type, dict[str, Any]]:
    """Splits a section into the class its ``name`` names and the other keys."""
    if 'name' not in section:
        raise RecipeError(f'{key}.name: is required; valid: {", ".join(sorted(available))}')
    found = find(f'{key}.name', section['name'], available)
    return found, {name: value for name, value in section.items() if name != 'name'}


def _trainer_arguments(recipe: Recipe) -> dict[str, Any]:
    return check_arguments('trainer', Trainer.__init__, recipe.trainer, provided=_SET_BY_RECIPE)


def _parallelism(recipe: Recipe) -> ParallelismConfig | None:
    configs: dict[str, type[Any]] = {'fsdp': FSDPConfig, 'fsdp2': FSDP2Config}
    built = {}
    for name, arguments in recipe.parallelism.items():
        # Composer's FSDPConfig accepts any keyword, so its declared fields are what can be checked against.
        known = {field.name for field in dataclasses.fields(configs[name]) if not field.name.startswith('_')}
        for argument, value in arguments.items():
            if argument not in known:
                raise unknown('key', f'parallelism.{name}.{argument}', value, argument, known)
        built[name] = construct(f'parallelism.{name}', configs[name], **arguments)
    return ParallelismConfig(**built) if built else None


def _save_folder(recipe: Recipe) -> Path | None:
    if recipe.save_folder is None:
        return None
    if parse_uri(recipe.save_folder)[0]:
        raise RecipeError(
            f'save_folder: {recipe.save_folder!r} is not a local directory; for an object store use '
            'callbacks.checkpoint_saver with its folder',
        )
    return Path(format_name_with_dist(recipe.save_folder, run_name=recipe.run_name or recipe.name))


def _check_save_folder(recipe: Recipe) -> None:
    """Finds out without creating anything whether the folder for checkpoints can be written."""
    folder = _save_folder(recipe)
    if folder is None:
        return
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise RecipeError(f'save_folder: {str(folder)!r} cannot be written, {str(existing)!r} is a file')
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RecipeError(f'save_folder: {str(folder)!r} cannot be written, no permission in {str(existing)!r}')


def _make_folder(folder: Path | None) -> None:
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecipeError(f'save_folder: {str(folder)!r} cannot be written: {error.strerror}') from None


def _save_config(recipe: Recipe, folder: Path) -> None:
    """Saves the resolved recipe; a reader sees the whole file or none."""
    partial = folder / '.config.yaml.partial'
    partial.write_text(OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(exclude_none=True))))
    partial.replace(folder / 'config.yaml')

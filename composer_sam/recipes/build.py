"""From a recipe to a Composer Trainer."""

from __future__ import annotations

from collections.abc import Sequence

from composer import Trainer
from composer.core import Callback, Evaluator
from composer.devices import DeviceGPU
from composer.models import ComposerModel
from composer.utils import dist, get_device, reproducibility
from torch.utils.data import DataLoader

from composer_sam.recipes.blame import BlamingTrainer
from composer_sam.recipes.check import check_recipe
from composer_sam.recipes.components import build_components, build_optimizer, build_parallelism, trainer_arguments
from composer_sam.recipes.data import Data, build_data
from composer_sam.recipes.divergence import Divergence
from composer_sam.recipes.early_stopping import TEST, VALIDATION, EarlyStopping
from composer_sam.recipes.networks import build_network
from composer_sam.recipes.save_folder import folder_of, make_folder, save_config
from composer_sam.recipes.schema import Recipe

__all__ = ['build_trainer']


def build_trainer(recipe: Recipe, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Build the Trainer of a recipe; its ``fit()`` trains.

    If the recipe has a ``save_folder``, the recipe itself is saved there as ``config.yaml``. Where the loss of the run
    is not finite, ``fit()`` raises :class:`~composer_sam.recipes.Diverged`.

    Args:
        recipe: a recipe that :func:`load_recipe` returned.
        callbacks: callbacks in addition to those of the recipe.

    Raises:
        RecipeError: the data cannot be read, the folder cannot be written, or Composer refuses the combination.
    """
    check_recipe(recipe)
    device = get_device(recipe.device)
    if dist.get_world_size() > 1:
        # Before the data is read: one process per node downloads it while the others wait.
        dist.initialize_dist(device, recipe.trainer.get('dist_timeout', 300.0))
    data = build_data(recipe.data, recipe.seed, isinstance(device, DeviceGPU), recipe.early_stopping)
    reproducibility.seed_all(recipe.seed)
    model = build_network(recipe.model, data)
    components = build_components(recipe)
    stopping = [EarlyStopping()] if recipe.early_stopping else []
    folder = folder_of(recipe)
    if folder is not None:
        make_folder(folder)
    trainer = BlamingTrainer(
        recipe,
        model=model,
        train_dataloader=data.train,
        eval_dataloader=_evaluations(data, model),
        optimizers=build_optimizer(recipe, model.parameters()),
        schedulers=components.scheduler,
        algorithms=components.algorithms,
        callbacks=[*components.callbacks, *stopping, *callbacks, Divergence(recipe)],
        loggers=components.loggers,
        max_duration=recipe.max_duration,
        eval_interval=recipe.eval_interval,
        run_name=recipe.run_name or recipe.name,
        load_path=recipe.load_path,
        save_folder=recipe.save_folder,
        save_interval=recipe.save_interval,
        autoresume=recipe.autoresume,
        parallelism_config=build_parallelism(recipe),
        device=device,
        precision=recipe.precision,
        device_train_microbatch_size=recipe.device_train_microbatch_size,
        seed=recipe.seed,
        # A killed run may leave checkpoints that are newer than the one from which it resumes. Composer's own bar is
        # there for those who ask for it; the commands show one of their own.
        **{'save_overwrite': recipe.autoresume, 'progress_bar': False, **trainer_arguments(recipe)},
    )
    if folder is not None and dist.get_global_rank() == 0:
        save_config(recipe, folder)
    return trainer


def _evaluations(data: Data, model: ComposerModel) -> DataLoader | list[Evaluator]:
    """Return what is evaluated: the test set, after the validation samples where these are wanted beside it."""
    if data.validation is None:
        return data.test
    names = list(model.get_metrics(is_train=False))
    loaders = {VALIDATION: data.validation, TEST: data.test}
    return [Evaluator(label=label, dataloader=loader, metric_names=names) for label, loader in loaders.items()]

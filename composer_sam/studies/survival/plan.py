"""The runs of a survival study: those that train networks, and those that begin with a trained one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer_sam.diagnostics.checks import check_at_least, check_between, check_positive
from composer_sam.diagnostics.damage import BITS
from composer_sam.files import file_name
from composer_sam.recipes import Recipe, RecipeError
from composer_sam.recipes.schema import CausalLM, Text
from composer_sam.studies.plan import StudyOptions, plan
from composer_sam.studies.run import StudyRun
from composer_sam.studies.texts import last_part, value_text

__all__ = ['OfNetwork', 'SurvivalOptions', 'SurvivalPlan', 'Trials', 'network_of', 'plan_survival']


@dataclass(frozen=True)
class Trials:
    """What is done to the weights of every trained network, and on how much text its losses are measured.

    Attributes:
        bits: the numbers of bits of quantised weights.
        group: the number of weights that share a scale.
        noise: the sizes of the noise on the weights, relative to the root mean square of each matrix.
        draws: the number of draws of every size.
        samples: the number of test sequences; all of a text that has fewer.
    """

    bits: Sequence[int] = (8, 4)
    group: int = 64
    noise: Sequence[float] = (0.05, 0.1, 0.2)
    draws: int = 3
    samples: int = 512

    def __post_init__(self) -> None:
        for bits in self.bits:
            check_between('--bits', bits, *BITS)
        for size in self.noise:
            check_positive('--noise', size)
        for name in ('group', 'draws', 'samples'):
            check_at_least(f'--{name}', getattr(self, name), 1)


@dataclass(frozen=True)
class SurvivalOptions:
    """What a survival study trains, what it does to the networks, and where it stores the results.

    Attributes:
        paths: the files of the recipes of language models, each of which may have a ``grid``, and overlays.
        finetune: the recipe of the fine-tuning: its text, optimizer and length, and the learning rates as its ``grid``.
            Its network is replaced by the trained ones. None not to fine-tune.
        overrides: ``dotted.key=value``, laid over the recipes, and not over the fine-tuning.
        grids: ``dotted.key=value,value``, for the recipes that have the key.
        seeds: the number of networks per recipe; the fine-tuning of each has its seed.
        out: the folder of the results.
        trials: what is done to the weights.
    """

    paths: Sequence[str]
    finetune: str | None = None
    overrides: Sequence[str] = ()
    grids: Sequence[str] = ()
    seeds: int = 1
    out: Path = Path('survival')
    trials: Trials = field(default_factory=Trials)


@dataclass(frozen=True)
class OfNetwork(StudyRun):
    """A run that begins with a trained network.

    Attributes:
        network: the run that trains the network.
    """

    network: StudyRun = field(kw_only=True)


@dataclass(frozen=True)
class SurvivalPlan:
    """The runs of a survival study, seed by seed.

    Attributes:
        trained: one for every network.
        measured: the measurements of every network.
        finetuned: the fine-tunings of every network.
    """

    trained: list[StudyRun]
    measured: list[OfNetwork]
    finetuned: list[OfNetwork]


def network_of(run: StudyRun) -> Path:
    """Return the folder of the network that a run trains, in the format of ``save_pretrained``."""
    return run.file.parent.parent / 'networks' / run.name


def plan_survival(options: SurvivalOptions, tell: Callable[[str], object]) -> SurvivalPlan:
    """Return all runs.

    Args:
        options: the recipes and what is done to their networks.
        tell: called with the lines of :func:`~composer_sam.recipes.load_recipe`.

    Raises:
        RecipeError: a recipe or a grid is not valid, or the fine-tuning does not fit a network.
    """
    study = StudyOptions(options.paths, options.overrides, options.grids, options.seeds, options.out, None)
    trained = plan(study, tell)
    for run in trained:
        _check_language_model(run.recipe, run.recipe.name)
    measured = [_measured(run, options.trials) for run in trained]
    if options.finetune is None:
        return SurvivalPlan(trained, measured, [])
    points = plan(StudyOptions([options.finetune], out=options.out, sharpness=None), tell)
    for run in trained:
        for point in points:
            _check_fits(point.recipe, run.recipe)
    finetuned = [_finetuned(run, point, options.trials) for run in trained for point in points]
    return SurvivalPlan(trained, measured, finetuned)


def _check_language_model(recipe: Recipe, name: str) -> None:
    if not isinstance(recipe.model, CausalLM):
        raise RecipeError(f'model.name: {name} trains {recipe.model.name!r}; survive takes language models, causal_lm')
    if recipe.parallelism:
        raise RecipeError(
            f'parallelism: {name} divides the network among processes, and survive trains it in one; remove the key '
            '(parallelism=null)'
        )


def _check_fits(finetuning: Recipe, recipe: Recipe) -> None:
    """Check that the networks of a recipe take the text of the fine-tuning."""
    _check_language_model(finetuning, '--finetune')
    text, first = finetuning.data, recipe.data
    assert isinstance(text, Text) and isinstance(first, Text)  # a causal_lm takes nothing else
    if text.tokenizer != first.tokenizer:
        raise RecipeError(
            f'--finetune: data.tokenizer is {text.tokenizer!r}, and {recipe.name} is trained with {first.tokenizer!r}; '
            'use the same'
        )
    if text.sequence_length > first.sequence_length:
        raise RecipeError(
            f'--finetune: data.sequence_length {text.sequence_length} is more than the {first.sequence_length} that '
            f'{recipe.name} is trained with'
        )


def _measured(run: StudyRun, trials: Trials) -> OfNetwork:
    config = {'network': run.config, 'trials': vars(trials)}
    file = run.file.parent.parent / 'measured' / run.file.name
    return OfNetwork(run.name, _of_network(run.recipe, run), {}, _plain(config), file, network=run)


def _finetuned(run: StudyRun, point: StudyRun, trials: Trials) -> OfNetwork:
    values = [f'{last_part(key)}={value_text(value)}' for key, value in point.values.items()]
    name = file_name('_'.join([run.name, *values]))
    seeded = point.recipe.model_copy(update={'name': name, 'run_name': name, 'seed': run.recipe.seed})
    config = {'network': run.config, 'finetuning': point.config | {'seed': run.recipe.seed}, 'samples': trials.samples}
    file = run.file.parent.parent / 'finetuned' / f'{name}.json'
    return OfNetwork(name, _of_network(seeded, run), point.values, _plain(config), file, network=run)


def _of_network(recipe: Recipe, run: StudyRun) -> Recipe:
    """Return the recipe with the network that a run trains, without checkpoints."""
    assert isinstance(recipe.model, CausalLM)
    model = recipe.model.model_copy(update={'config': None, 'root': str(network_of(run))})
    return recipe.model_copy(update={'model': model, 'save_folder': None, 'autoresume': False})


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Return JSON's own types."""
    return json.loads(json.dumps(config))

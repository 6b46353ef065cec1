"""The work of a survival study, each piece in a process of its own: training, measuring and fine-tuning."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from composer_sam.diagnostics.damage import noisy, quantized
from composer_sam.files import write_whole
from composer_sam.landscapes.grid import measuring
from composer_sam.recipes import Recipe
from composer_sam.studies.parallel import Report
from composer_sam.studies.problem import build_problem
from composer_sam.studies.result import RunResult
from composer_sam.studies.run import Curves, StudyRun, train_and_measure, trained
from composer_sam.studies.survival.plan import OfNetwork, Trials, network_of
from composer_sam.studies.survival.results import Finetuned, Measured

__all__ = ['finetune', 'measure', 'train']


def train(recipe: Recipe, report: Report, runs: Mapping[str, StudyRun]) -> RunResult:
    """Train a network, save it, and write the run's file.

    Args:
        recipe: the recipe of the run.
        report: the callback that reports the progress of training.
        runs: all runs by the ``run_name`` of their recipes.
    """
    return train_and_measure(recipe, report, runs, None, keep=_save_network, geometry=False)


def measure(recipe: Recipe, report: Report, runs: Mapping[str, OfNetwork], trials: Trials) -> Measured:
    """Measure the loss of a trained network, quantised and with noise too, and write the run's file."""
    run = runs[str(recipe.run_name)]
    problem = build_problem(recipe, 'test', trials.samples)
    model = problem.model
    losses = 1 + len(trials.bits) + len(trials.noise) * trials.draws

    def loss(weights: dict[str, Tensor] | None = None) -> float:
        report.send(1 / losses)
        return _loss(model, problem.batches, weights)

    result = Measured(
        name=run.name,
        loss=loss(),
        quantized={str(bits): loss(quantized(model, bits, trials.group)) for bits in trials.bits},
        noisy={f'{size:g}': [loss(noisy(model, size, seed)) for seed in range(trials.draws)] for size in trials.noise},
        sequences=problem.samples,
        config=run.config,
    )
    return _written(run, result, Measured)


def finetune(recipe: Recipe, report: Report, runs: Mapping[str, OfNetwork], trials: Trials) -> Finetuned:
    """Fine-tune a trained network, measure its losses on both texts, and write the run's file."""
    run = runs[str(recipe.run_name)]
    other = build_problem(recipe, 'test', trials.samples)
    first = build_problem(run.network.recipe, 'test', trials.samples)
    before = _loss(other.model, other.batches)
    curves = Curves()
    model = trained(recipe, curves, [report]).state.model
    result = Finetuned(
        name=run.name,
        network=run.network.name,
        values=run.values,
        before=before,
        after=_loss(model, other.batches),
        first=_loss(model, first.batches),
        steps=curves.steps,
        seconds=curves.seconds,
        config=run.config,
    )
    return _written(run, result, Finetuned)


def _loss(model: Any, batches: Sequence[Any], weights: dict[str, Tensor] | None = None) -> float:
    """Return the mean loss in evaluation mode, with other weights where they are given; the model has its own again."""
    with measuring(getattr(model, '_orig_mod', model), None, batches) as evaluate:
        return evaluate(weights or {})[0]


def _written(run: StudyRun, result: Any, kind: Any) -> Any:
    """Write the file of a run, and return what is read from it."""
    content = result.to_json()
    write_whole(run.file, json.dumps(content, indent=1, allow_nan=False))
    return kind(**content)


def _save_network(run: StudyRun, model: Any) -> None:
    """Save the network of a run in the format of ``save_pretrained``, whole or not at all."""
    folder = network_of(run)
    beside = folder.with_name(f'.{folder.name}.new')
    shutil.rmtree(beside, ignore_errors=True)
    getattr(model, '_orig_mod', model).model.save_pretrained(str(beside))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)

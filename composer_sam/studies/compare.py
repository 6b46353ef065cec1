"""Recipes trained with several seeds side by side, and compared."""

from __future__ import annotations

import functools
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from composer_sam.diagnostics.measure import Measurements
from composer_sam.extras import extra
from composer_sam.files import file_name, write_whole
from composer_sam.landscapes.pictures import png
from composer_sam.recipes import Recipe, RecipeError, load_recipe
from composer_sam.studies.console import console, note, progress_bar
from composer_sam.studies.curves import draw as draw_curves
from composer_sam.studies.kept import finished_runs, results_folder, train_missing
from composer_sam.studies.landscape import Request, landscapes
from composer_sam.studies.parallel import Report, RunError, share_cores, with_seed
from composer_sam.studies.problem import build_problem, described
from composer_sam.studies.report import write_pictures
from composer_sam.studies.run import Curves, StudyRun, config_of, trained
from composer_sam.studies.sharpness import Sharpness, measure_trained
from composer_sam.studies.texts import grouped, mean_text

with extra('composer', __name__):
    from rich.table import Table
with extra('diagnostics', __name__):
    from matplotlib.figure import Figure

__all__ = ['Run', 'RunError', 'compare', 'draw', 'tabulate', 'tabulate_sharpness']

_SHARPNESS = Sharpness()
_CHOSEN = (
    'the result of the epoch with the best accuracy on validation images, {:g} % of the training images with their '
    'label noise; the test set plays no part in the choice'
)
_MEASURES = ('loss', 'top_eigenvalue', 'trace', 'sam_sharpness')


@dataclass(frozen=True)
class _Column:
    """A column of the table of sharpness."""

    heading: str
    read: Callable[[Measurements], float | None]
    digits: int


_COLUMNS = (
    _Column('largest eigenvalue', lambda found: found.top_eigenvalue, 2),
    _Column('trace', lambda found: found.trace, 1),
    _Column('SAM sharpness', lambda found: found.sam_sharpness, 4),
)


@dataclass(frozen=True)
class Run:
    """The result of one run.

    Attributes:
        name: the name of the run and of its file.
        recipe: the name of the recipe.
        seed: the seed of the run.
        steps: optimizer steps.
        seconds_per_step: mean wall time of a step, without testing.
        accuracy: test accuracy at the end, or at the epoch that ``early_stopping`` has chosen.
        loss: test loss there.
        how: how many runs were trained side by side, with how many threads.
        config: everything the result depends on.
        train: training loss by epoch.
        test: test accuracy and loss by epoch.
        sharpness: the measurements of the trained network; None if it was not to be measured.
        stop_epoch: the epoch that ``early_stopping`` has chosen; None without it.
        validation: accuracy and loss on the validation images by epoch; empty without ``early_stopping``.
    """

    name: str
    recipe: str
    seed: int
    steps: int
    seconds_per_step: float
    accuracy: float
    loss: float
    how: str
    config: dict[str, Any]
    train: dict[str, list[float]]
    test: dict[str, list[float]]
    sharpness: Measurements | None = None
    stop_epoch: float | None = None
    validation: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return JSON's own types."""
        return {**vars(self), 'sharpness': None if self.sharpness is None else self.sharpness.as_dict()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Run:
        """Return the result that :meth:`to_json` turned into ``found``.

        Raises:
            TypeError: a key is missing, or there is an unknown one.
        """
        measured = found['sharpness']
        if measured is not None:
            known = {key: value for key, value in measured.items() if key != 'top_eigenvalue'}
            measured = Measurements(eigenvalues=(measured['top_eigenvalue'],), **known)
        return cls(**{**found, 'sharpness': measured})


def compare(
    paths: Sequence[str],
    overrides: Sequence[str] = (),
    seeds: int = 1,
    out: Path = Path('comparison'),
    jobs: int | None = None,
    sharpness: bool = False,
    landscape: bool = False,
) -> list[Run]:
    """Train every recipe with ``seeds`` seeds, print a table, and write ``comparison.png`` and ``results.json``.

    The seeds are the recipe's own and those that follow it. The runs of different recipes alternate, so that runs side
    by side slow all recipes down by the same amount. Every finished run is one file in ``out/runs`` and is not trained
    again. Checkpoints are saved to one folder per run, if a recipe saves any; then an interrupted run is resumed.

    Args:
        paths: the files of the recipes, with overlays joined by ``+``; costs are relative to the first.
        overrides: ``dotted.key=value``, laid over every recipe.
        seeds: the number of runs per recipe.
        out: the folder of the picture and the results.
        jobs: how many runs are trained side by side; if None, one per core, and one where a GPU is used.
        sharpness: measure every trained network on training samples.
        landscape: draw the loss around the network of every recipe's first seed, all on the same scale.

    Raises:
        RecipeError: a recipe or ``out`` is not valid, or ``out`` holds runs of another comparison.
        RunError: runs failed; the others are finished.
    """
    lines: list[str] = []
    recipes = _load(paths, overrides, lines.append)
    if landscape:
        _check_alike(recipes)
    runs = _plan(recipes, seeds, out, sharpness)
    networks = {run.name: out / 'landscape' / f'{run.name}.pt' for run in runs[: len(recipes)]} if landscape else {}
    with results_folder(out, 'runs', *(['landscape'] * landscape)):
        finished = finished_runs(
            runs, Run.from_json, lambda run: run.name not in networks or networks[run.name].exists()
        )
        for line in dict.fromkeys(lines):
            note(line)
        jobs, threads = share_cores([run.recipe for run in runs], jobs)
        how = f'{jobs} runs side by side, {threads} {"thread" if threads == 1 else "threads"} each'
        by_name = {str(run.recipe.run_name): run for run in runs}
        work = functools.partial(_train, runs=by_name, networks=networks, how=how, sharpness=sharpness)
        if not networks.keys() <= finished.keys():
            for file in (out / 'landscape').glob('*.npz'):
                file.unlink()  # its landscape is that of another network
        done, failures = train_missing(runs, finished, work, jobs, threads)
        if failures:
            raise RunError(f'{len(failures)} of {len(runs)} runs failed: {"; ".join(map(str, failures))}')
        results = [done[run.name] for run in runs]
        _print(results, recipes, sharpness)
        _write(results, recipes, out)
        if landscape:
            pictures = _landscape(recipes, list(networks.values()), out, jobs)
            console().print(f'landscapes in {", ".join(map(str, pictures))}', soft_wrap=True)
    return results


def _print(results: Sequence[Run], recipes: Sequence[Recipe], sharpness: bool) -> None:
    """Print the tables."""
    stdout = console()
    stdout.print(tabulate(results))
    for recipe in recipes:
        if recipe.early_stopping:
            stdout.print(f'{recipe.name}: {_CHOSEN.format(100 * recipe.data.validation_fraction)}', soft_wrap=True)
    if sharpness:
        stdout.print(tabulate_sharpness(results))
        stdout.print(
            f'of the Hessian on {_SHARPNESS.samples} training samples; '
            f'SAM sharpness: the growth of their loss within {_SHARPNESS.rho:g}',
            soft_wrap=True,
        )


def _write(results: Sequence[Run], recipes: Sequence[Recipe], out: Path) -> None:
    """Write the numbers and the picture, and print where they are."""
    how = ' or '.join(dict.fromkeys(run.how for run in results))
    numbers, picture = out / 'results.json', out / 'comparison.png'
    write_whole(numbers, json.dumps({'how': how, 'runs': [run.to_json() for run in results]}, indent=1))
    about = described((recipe.data.name, recipe.data.label_noise) for recipe in recipes)
    write_whole(picture, png(draw(results, about)))
    console().print(f'{how}; curves in {picture}, numbers in {numbers}', soft_wrap=True)


def tabulate(runs: Sequence[Run]) -> Table:
    """Return a table with a row per recipe: mean and standard deviation over the seeds, and the cost of a step.

    Where a recipe has ``early_stopping``, the table has the epochs of the results, in the order of the seeds.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column('recipe', overflow='fold')
    stopped = any(run.stop_epoch is not None for run in runs)
    for heading in ('seeds', *(['epoch'] * stopped), 'test accuracy', 'test loss', 'ms per step', 'cost'):
        table.add_column(heading, justify='right')
    by_recipe = grouped(runs, lambda run: run.recipe)
    baseline = statistics.fmean(run.seconds_per_step for run in next(iter(by_recipe.values())))
    for name, group in by_recipe.items():
        seconds = [run.seconds_per_step for run in group]
        table.add_row(
            name,
            str(len(group)),
            *([_epochs(group)] * stopped),
            mean_text([100 * run.accuracy for run in group], 1, ' %'),
            mean_text([run.loss for run in group], 3),
            mean_text([1000 * second for second in seconds], 2),
            f'{statistics.fmean(seconds) / baseline:.2f}x',
        )
    return table


def tabulate_sharpness(runs: Sequence[Run]) -> Table:
    """Return a table with a row per recipe: mean and standard deviation over the seeds of the sharpness."""
    table = Table(box=None, pad_edge=False)
    table.add_column('recipe', overflow='fold')
    for column in _COLUMNS:
        table.add_column(column.heading, justify='right')
    for name, group in grouped(runs, lambda run: run.recipe).items():
        cells = []
        for column in _COLUMNS:
            values = [column.read(run.sharpness) for run in group if run.sharpness is not None]
            cells.append(mean_text([value for value in values if value is not None], column.digits))
        table.add_row(name, *cells)
    return table


def draw(runs: Sequence[Run], about: str = '') -> Figure:
    """Draw the runs' test accuracy and training loss by epoch.

    Args:
        runs: the runs.
        about: what they were trained on, for the title.
    """
    return draw_curves(grouped(runs, lambda run: run.recipe), about)


def _load(paths: Sequence[str], overrides: Sequence[str], tell: Callable[[str], object]) -> list[Recipe]:
    if not paths:
        raise RecipeError('compare needs at least one recipe')
    recipes = [load_recipe(path, (), overrides, tell) for path in paths]
    for index, recipe in enumerate(recipes):
        for path, earlier in zip(paths, recipes[:index], strict=False):
            if file_name(recipe.name) == file_name(earlier.name):
                raise RecipeError(
                    f'name: {path} and {paths[index]} are both called {recipe.name!r}; rename one of them'
                )
    return recipes


def _check_alike(recipes: Sequence[Recipe]) -> None:
    for recipe in recipes[1:]:
        for section in ('model', 'data'):
            ours, theirs = (getattr(one, section).model_dump() for one in (recipe, recipes[0]))
            # The images that early stopping holds out change no scale; the samples are those of the first recipe.
            if {**ours, 'validation_fraction': 0} != {**theirs, 'validation_fraction': 0}:
                raise RecipeError(
                    f'--landscape: {recipe.name!r} and {recipes[0].name!r} differ in {section}, and their landscapes '
                    'have no scale in common; compare recipes of one model and data set'
                )


def _plan(recipes: Sequence[Recipe], seeds: int, out: Path, sharpness: bool) -> list[StudyRun]:
    """Return all runs, seed by seed."""
    runs = []
    for offset in range(seeds):
        for recipe in recipes:
            seeded = with_seed(recipe, recipe.seed + offset)
            if seeded.save_folder is not None:
                seeded = seeded.model_copy(update={'autoresume': True})
            name = file_name(str(seeded.run_name))
            config = config_of(recipe, seeded.seed, _SHARPNESS if sharpness else None)
            runs.append(StudyRun(name, seeded, {}, config, out / 'runs' / f'{name}.json', keep_checkpoints=True))
    return runs


def _landscape(recipes: Sequence[Recipe], networks: Sequence[Path], out: Path, jobs: int) -> list[Path]:
    """Evaluate and draw the landscapes of the networks, and return the files of the pictures."""
    names = tuple(recipe.name for recipe in recipes)
    request = Request(paths=tuple(networks), labels=names, samples=_SHARPNESS.samples)
    with progress_bar('rows') as progress:
        found = landscapes(request, recipes[0], out / 'landscape', jobs, progress)
    return write_pictures(found, request, out)


def _train(
    recipe: Recipe,
    report: Report,
    runs: Mapping[str, StudyRun],
    networks: Mapping[str, Path],
    how: str,
    sharpness: bool,
) -> Run:
    """Train one recipe and write the run's file; where requested, measure the network and save its weights."""
    run = runs[str(recipe.run_name)]
    curves = Curves()
    model = trained(recipe, curves, [report]).state.model
    if (file := networks.get(run.name)) is not None:
        weights = io.BytesIO()
        torch.save(model.state_dict(), weights)
        write_whole(file, weights.getvalue())
    result = Run(
        name=run.name,
        recipe=recipe.name,
        seed=recipe.seed,
        steps=curves.steps,
        seconds_per_step=curves.seconds_per_step,
        accuracy=curves.accuracy,
        loss=curves.loss,
        how=how,
        config=run.config,
        train=curves.train,
        test=curves.test,
        sharpness=_measured(recipe, model) if sharpness else None,
        stop_epoch=None if curves.stop is None else curves.stop.epoch,
        validation=curves.validation if curves.stop else {},
    )
    write_whole(run.file, json.dumps(result.to_json(), indent=1))
    return result


def _measured(recipe: Recipe, model: nn.Module) -> Measurements:
    """Measure a copy of a trained network."""
    problem = build_problem(recipe, 'train', _SHARPNESS.samples)
    problem.model.load_state_dict(model.state_dict())
    return measure_trained(problem.model, problem, _SHARPNESS, _MEASURES)


def _epochs(runs: Sequence[Run]) -> str:
    """Return the epochs of the results, in the order of the seeds; one if they are all the same."""
    epochs = [run.test['epoch'][-1] if run.stop_epoch is None else run.stop_epoch for run in runs]
    return ', '.join(f'{epoch:g}' for epoch in (epochs if len(set(epochs)) > 1 else epochs[:1]))

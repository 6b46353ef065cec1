"""Recipes trained with several seeds side by side, and compared."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from composer_sam.diagnostics.measure import Measurements
from composer_sam.extras import extra
from composer_sam.files import write_whole
from composer_sam.landscapes.pictures import png
from composer_sam.recipes import History, Recipe, RecipeError, build_trainer, load_recipe
from composer_sam.studies.console import progress_bar
from composer_sam.studies.landscape import Request, landscapes
from composer_sam.studies.parallel import Report, RunError, make_folder, share_cores, train_all, with_seed
from composer_sam.studies.problem import build_problem
from composer_sam.studies.report import write_pictures
from composer_sam.studies.sharpness import Sharpness, measure_trained

with extra('composer', __name__):
    from rich.console import Console
    from rich.table import Table
with extra('diagnostics', __name__):
    from matplotlib.figure import Figure

__all__ = ['Run', 'RunError', 'compare', 'draw', 'tabulate', 'tabulate_sharpness']

_SHARPNESS = Sharpness()
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
        recipe: the name of the recipe.
        seed: the seed of the run.
        steps: optimizer steps.
        seconds_per_step: mean wall time of a step, without testing.
        accuracy: test accuracy at the end.
        loss: test loss at the end.
        train: training loss by epoch.
        test: test accuracy and loss by epoch.
        sharpness: the measurements of the trained network; None if it was not to be measured.
    """

    recipe: str
    seed: int
    steps: int
    seconds_per_step: float
    accuracy: float
    loss: float
    train: dict[str, list[float]]
    test: dict[str, list[float]]
    sharpness: Measurements | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON's own types."""
        return {**vars(self), 'sharpness': None if self.sharpness is None else self.sharpness.as_dict()}


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
    by side slow all recipes down by the same amount. Checkpoints are saved to one folder per run, if a recipe saves
    any.

    Args:
        paths: the files of the recipes; costs are relative to the first.
        overrides: ``dotted.key=value``, laid over every recipe.
        seeds: the number of runs per recipe.
        out: the folder of the picture and the results.
        jobs: how many runs are trained side by side; if None, one per core, and one where a GPU is used.
        sharpness: measure every trained network on training samples.
        landscape: draw the loss around the network of every recipe's first seed, all on the same scale.

    Raises:
        RecipeError: a recipe or ``out`` is not valid; nothing has been trained.
        RunError: a run failed.
    """
    recipes = _load(paths, overrides)
    if landscape:
        _check_alike(recipes)
    runs = [with_seed(recipe, recipe.seed + offset) for offset in range(seeds) for recipe in recipes]
    make_folder(out)
    jobs, threads = share_cores(runs, jobs)
    finished: dict[tuple[str, int], Run] = {}

    def receive(recipe: Recipe, result: Run | Exception) -> None:
        if isinstance(result, Exception):
            raise result
        finished[recipe.name, recipe.seed] = result

    kept = _kept(runs[: len(recipes)], out) if landscape else {}
    work = functools.partial(_train, sharpness=sharpness, kept=kept)
    train_all(runs, work, receive, jobs, threads)
    results = [finished[recipe.name, recipe.seed] for recipe in runs]

    how = f'{jobs} runs side by side, {threads} {"thread" if threads == 1 else "threads"} each'
    report = {'how': how, 'runs': [run.to_json() for run in results]}
    write_whole(out / 'results.json', json.dumps(report, indent=1))
    picture = out / 'comparison.png'
    write_whole(picture, png(draw(results)))
    pictures = _landscape(recipes, list(kept.values()), out, jobs) if landscape else []
    console = Console(highlight=False, markup=False)
    console.print(tabulate(results))
    if sharpness:
        console.print(tabulate_sharpness(results))
        console.print(
            f'of the Hessian on {_SHARPNESS.samples} training samples; '
            f'SAM sharpness: the growth of their loss within {_SHARPNESS.rho:g}',
            soft_wrap=True,
        )
    console.print(f'{how}; curves in {picture}, numbers in {out / "results.json"}', soft_wrap=True)
    if pictures:
        console.print(f'landscapes in {", ".join(map(str, pictures))}', soft_wrap=True)
    return results


def tabulate(runs: Sequence[Run]) -> Table:
    """Return a table with a row per recipe: mean and standard deviation over the seeds, and the cost of a step."""
    table = Table(box=None, pad_edge=False)
    table.add_column('recipe')
    for heading in ('seeds', 'test accuracy', 'test loss', 'ms per step', 'cost'):
        table.add_column(heading, justify='right')
    grouped = _by_recipe(runs)
    baseline = statistics.fmean(run.seconds_per_step for run in next(iter(grouped.values())))
    for name, group in grouped.items():
        seconds = [run.seconds_per_step for run in group]
        table.add_row(
            name,
            str(len(group)),
            _spread([100 * run.accuracy for run in group], 1, ' %'),
            _spread([run.loss for run in group], 3),
            _spread([1000 * second for second in seconds], 2),
            f'{statistics.fmean(seconds) / baseline:.2f}x',
        )
    return table


def tabulate_sharpness(runs: Sequence[Run]) -> Table:
    """Return a table with a row per recipe: mean and standard deviation over the seeds of the sharpness."""
    table = Table(box=None, pad_edge=False)
    table.add_column('recipe')
    for column in _COLUMNS:
        table.add_column(column.heading, justify='right')
    for name, group in _by_recipe(runs).items():
        cells = []
        for column in _COLUMNS:
            values = [column.read(run.sharpness) for run in group if run.sharpness is not None]
            cells.append(_spread([value for value in values if value is not None], column.digits))
        table.add_row(name, *cells)
    return table


def draw(runs: Sequence[Run]) -> Figure:
    """Draw test accuracy and training loss by epoch: the mean over the seeds, in a band from lowest to highest."""
    figure = Figure(figsize=(11, 4.2), layout='constrained')
    accuracy, loss = figure.subplots(1, 2)
    for name, group in _by_recipe(runs).items():
        for axes, curves, key, scale in (
            (accuracy, [run.test for run in group], 'accuracy', 100),
            (loss, [run.train for run in group], 'loss', 1),
        ):
            columns = list(zip(*(curve[key] for curve in curves), strict=False))
            epochs = curves[0]['epoch'][: len(columns)]
            (line,) = axes.plot(epochs, [scale * statistics.fmean(column) for column in columns], label=name)
            lowest, highest = ([scale * pick(column) for column in columns] for pick in (min, max))
            axes.fill_between(epochs, lowest, highest, alpha=0.2, color=line.get_color(), linewidth=0)
    accuracy.set(xlabel='epoch', ylabel='test accuracy (%)')
    loss.set(xlabel='epoch', ylabel='training loss')
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
    accuracy.legend(frameon=False)
    return figure


def _load(paths: Sequence[str], overrides: Sequence[str]) -> list[Recipe]:
    if not paths:
        raise RecipeError('compare needs at least one recipe')
    recipes = [load_recipe(path, (), overrides) for path in paths]
    for index, recipe in enumerate(recipes):
        for path, earlier in zip(paths, recipes[:index], strict=False):
            if recipe.name == earlier.name:
                raise RecipeError(
                    f'name: {path} and {paths[index]} are both called {recipe.name!r}; rename one of them'
                )
    return recipes


def _check_alike(recipes: Sequence[Recipe]) -> None:
    for recipe in recipes[1:]:
        for section in ('model', 'data'):
            if getattr(recipe, section) != getattr(recipes[0], section):
                raise RecipeError(
                    f'--landscape: {recipe.name!r} and {recipes[0].name!r} differ in {section}, and their landscapes '
                    'have no scale in common; compare recipes of one model and data set'
                )


def _kept(runs: Sequence[Recipe], out: Path) -> dict[str, Path]:
    """Return the files of the networks whose landscape is drawn, by run; delete those of an earlier comparison."""
    folder = out / 'landscape'
    folder.mkdir(exist_ok=True)
    for file in (*folder.glob('*.npz'), *folder.glob('*.pt')):
        file.unlink()  # its landscapes are of other networks
    return {str(run.run_name): folder / f'{run.run_name}.pt' for run in runs}


def _landscape(recipes: Sequence[Recipe], networks: Sequence[Path], out: Path, jobs: int) -> list[Path]:
    """Evaluate and draw the landscapes of the networks, and return the files of the pictures."""
    names = tuple(recipe.name for recipe in recipes)
    request = Request(paths=tuple(networks), labels=names, samples=_SHARPNESS.samples)
    with progress_bar('rows') as progress:
        found = landscapes(request, recipes[0], out / 'landscape', jobs, progress)
    return write_pictures(found, request, out)


def _train(recipe: Recipe, report: Report, sharpness: bool, kept: Mapping[str, Path]) -> Run:
    """Train one recipe; where requested, measure the network and save its weights."""
    history = History()
    trainer = build_trainer(recipe, [history, report])
    try:
        trainer.fit()
        if not history.test['epoch']:
            trainer.eval()
        if (file := kept.get(str(recipe.run_name))) is not None:
            torch.save(trainer.state.model.state_dict(), file)
        found = _measured(recipe, trainer.state.model) if sharpness else None
    finally:
        trainer.close()
    return Run(
        recipe=recipe.name,
        seed=recipe.seed,
        steps=history.steps,
        seconds_per_step=history.seconds_per_step,
        accuracy=history.test['accuracy'][-1],
        loss=history.test['loss'][-1],
        train=history.train,
        test=history.test,
        sharpness=found,
    )


def _measured(recipe: Recipe, model: nn.Module) -> Measurements:
    """Measure a copy of a trained network."""
    problem = build_problem(recipe, 'train', _SHARPNESS.samples)
    problem.model.load_state_dict(model.state_dict())
    return measure_trained(problem.model, problem, _SHARPNESS, _MEASURES)


def _by_recipe(runs: Sequence[Run]) -> dict[str, list[Run]]:
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.recipe, []).append(run)
    return grouped


def _spread(values: Sequence[float], digits: int, unit: str = '') -> str:
    mean = f'{statistics.fmean(values):.{digits}f}'
    return f'{mean} ± {statistics.stdev(values):.{digits}f}{unit}' if len(values) > 1 else f'{mean}{unit}'

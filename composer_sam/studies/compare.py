"""Trains several recipes with several seeds, side by side, and shows how they differ."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from composer_sam.recipes import History, Recipe, RecipeError, build_trainer, load_recipe
from composer_sam.studies.checkpoints import Request, landscapes, measure_trained
from composer_sam.studies.parallel import Report, RunError, make_folder, share_cores, train_all, with_seed, write
from composer_sam.studies.report import progress_bar, write_pictures

__all__ = ['Run', 'RunError', 'compare', 'draw', 'tabulate', 'tabulate_sharpness']

SAMPLES = 512
RHO = 0.05
# The columns of measured runs: which measure, with how many digits.
SHARPNESS = {
    'largest eigenvalue': ('top_eigenvalue', 2),
    'trace': ('trace', 1),
    'SAM sharpness': ('sam_sharpness', 4),
}


@dataclass(frozen=True)
class Run:
    """What one run came to.

    Attributes:
        recipe: Name of the recipe.
        seed: Seed of the run.
        steps: Optimizer steps taken.
        seconds_per_step: Mean, testing left out.
        accuracy: On the test data, at the end.
        loss: On the test data, at the end.
        train: Training loss by epoch.
        test: Test accuracy and loss by epoch.
        sharpness: What :func:`~composer_sam.studies.checkpoints.measure_trained` found at the end, if it was asked.
    """

    recipe: str
    seed: int
    steps: int
    seconds_per_step: float
    accuracy: float
    loss: float
    train: dict[str, list[float]]
    test: dict[str, list[float]]
    sharpness: dict[str, float] | None = None


def compare(
    paths: Sequence[str],
    overrides: Sequence[str] = (),
    seeds: int = 1,
    out: Path = Path('comparison'),
    jobs: int | None = None,
    sharpness: bool = False,
    landscape: bool = False,
) -> list[Run]:
    """Trains every recipe with ``seeds`` seeds, prints a table and writes ``comparison.png`` and ``results.json``.

    The seeds are the recipe's own and those that follow it. Runs take turns by recipe, so that what runs side by side
    slows all recipes alike. Checkpoints, where a recipe asks for them, go to a directory per run.

    Args:
        paths: The recipes' files; costs are relative to the first.
        overrides: ``dotted.key=value``, laid over every recipe.
        seeds: Runs per recipe.
        out: Directory for the picture and the results.
        jobs: Runs side by side; by default one per core, and one where a GPU is used.
        sharpness: Measure every trained network on training samples.
        landscape: Draw the loss around the network of every recipe's first seed, all on the same scale.

    Raises:
        RecipeError: If a recipe or ``out`` is not valid; nothing has been trained then.
        RunError: If a run failed.
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
    report = {'how': how, 'runs': [asdict(run) for run in results]}
    write(out / 'results.json', json.dumps(report, indent=1).encode())
    picture = out / 'comparison.png'
    draw(results).savefig(picture, dpi=150)
    pictures = _landscape(recipes, list(kept.values()), out, jobs) if landscape else []
    console = Console(highlight=False, markup=False)
    console.print(tabulate(results))
    if sharpness:
        console.print(tabulate_sharpness(results))
        console.print(
            f'of the Hessian on {SAMPLES} training samples; SAM sharpness: the growth of their loss within {RHO:g}',
            soft_wrap=True,
        )
    console.print(f'{how}; curves in {picture}, numbers in {out / "results.json"}', soft_wrap=True)
    if pictures:
        console.print(f'landscapes in {", ".join(map(str, pictures))}', soft_wrap=True)
    return results


def tabulate(runs: Sequence[Run]) -> Table:
    """One row per recipe: mean and standard deviation over the seeds, and the cost of a step."""
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
    """One row per recipe: mean and standard deviation over the seeds of what was measured."""
    table = Table(box=None, pad_edge=False)
    table.add_column('recipe')
    for heading in SHARPNESS:
        table.add_column(heading, justify='right')
    for name, group in _by_recipe(runs).items():
        cells = [
            _spread([run.sharpness[measure] for run in group if run.sharpness], digits)
            for measure, digits in SHARPNESS.values()
        ]
        table.add_row(name, *cells)
    return table


def draw(runs: Sequence[Run]) -> Figure:
    """Test accuracy and training loss by epoch: the mean over the seeds in a band from lowest to highest."""
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
    """The files of the networks whose landscape is drawn, by run."""
    folder = out / 'landscape'
    folder.mkdir(exist_ok=True)
    for file in (*folder.glob('*.npz'), *folder.glob('*.pt')):
        file.unlink()  # an earlier comparison's: its landscapes are of other networks
    return {str(run.run_name): folder / f'{run.run_name}.pt' for run in runs}


def _landscape(recipes: Sequence[Recipe], networks: Sequence[Path], out: Path, jobs: int) -> list[Path]:
    names = tuple(recipe.name for recipe in recipes)
    request = Request(paths=tuple(networks), labels=names, samples=SAMPLES)
    with progress_bar('rows') as progress:
        found = landscapes(request, recipes[0], out / 'landscape', jobs, progress)
    return write_pictures(found, request, out)


def _train(recipe: Recipe, report: Report, sharpness: bool, kept: Mapping[str, Path]) -> Run:
    """Trains one recipe, measures the network and keeps its weights, if that is asked for."""
    history = History()
    trainer = build_trainer(recipe, [history, report])
    try:
        trainer.fit()
        if not history.test['epoch']:
            trainer.eval()
        if (file := kept.get(str(recipe.run_name))) is not None:
            torch.save(trainer.state.model.state_dict(), file)
        found = measure_trained(recipe, trainer.state.model, samples=SAMPLES, rho=RHO) if sharpness else None
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


def _by_recipe(runs: Sequence[Run]) -> dict[str, list[Run]]:
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.recipe, []).append(run)
    return grouped


def _spread(values: Sequence[float], digits: int, unit: str = '') -> str:
    mean = f'{statistics.fmean(values):.{digits}f}'
    return f'{mean} ± {statistics.stdev(values):.{digits}f}{unit}' if len(values) > 1 else f'{mean}{unit}'

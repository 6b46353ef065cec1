"""Trains several recipes with several seeds, side by side, and shows how they differ."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from composer_sam.recipes import History, Recipe, RecipeError, build_trainer, load_recipe
from composer_sam.runs import Report, RunError, make_folder, share_cores, train_all, with_seed, write

__all__ = ['Run', 'RunError', 'compare', 'draw', 'tabulate']


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
    """

    recipe: str
    seed: int
    steps: int
    seconds_per_step: float
    accuracy: float
    loss: float
    train: dict[str, list[float]]
    test: dict[str, list[float]]


def compare(
    paths: Sequence[str],
    overrides: Sequence[str] = (),
    seeds: int = 1,
    out: Path = Path('comparison'),
    jobs: int | None = None,
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

    Raises:
        RecipeError: If a recipe or ``out`` is not valid; nothing has been trained then.
        RunError: If a run failed.
    """
    recipes = _load(paths, overrides)
    runs = [with_seed(recipe, recipe.seed + offset) for offset in range(seeds) for recipe in recipes]
    make_folder(out)
    jobs, threads = share_cores(runs, jobs)
    finished: dict[tuple[str, int], Run] = {}

    def receive(recipe: Recipe, result: Run | Exception) -> None:
        if isinstance(result, Exception):
            raise result
        finished[recipe.name, recipe.seed] = result

    train_all(runs, _train, receive, jobs, threads)
    results = [finished[recipe.name, recipe.seed] for recipe in runs]

    how = f'{jobs} runs side by side, {threads} {"thread" if threads == 1 else "threads"} each'
    report = {'how': how, 'runs': [asdict(run) for run in results]}
    write(out / 'results.json', json.dumps(report, indent=1).encode())
    picture = out / 'comparison.png'
    draw(results).savefig(picture, dpi=150)
    console = Console(highlight=False, markup=False)
    console.print(tabulate(results))
    console.print(f'{how}; curves in {picture}, numbers in {out / "results.json"}', soft_wrap=True)
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


def _train(recipe: Recipe, report: Report) -> Run:
    """Trains one recipe."""
    history = History()
    trainer = build_trainer(recipe, [history, report])
    try:
        trainer.fit()
        if not history.test['epoch']:
            trainer.eval()
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
    )


def _by_recipe(runs: Sequence[Run]) -> dict[str, list[Run]]:
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.recipe, []).append(run)
    return grouped


def _spread(values: Sequence[float], digits: int, unit: str = '') -> str:
    mean = f'{statistics.fmean(values):.{digits}f}'
    return f'{mean} ± {statistics.stdev(values):.{digits}f}{unit}' if len(values) > 1 else f'{mean}{unit}'

"""Grids of recipes, values and seeds: trained, resumed after an interruption, and tabulated."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from composer_sam.files import write_whole
from composer_sam.landscapes.pictures import png
from composer_sam.studies.console import console, note
from composer_sam.studies.drawing import draw
from composer_sam.studies.kept import finished_runs, results_folder, train_missing
from composer_sam.studies.parallel import RunError, share_cores
from composer_sam.studies.plan import StudyOptions, plan
from composer_sam.studies.result import RunResult
from composer_sam.studies.run import train_and_measure
from composer_sam.studies.tables import about, tables
from composer_sam.studies.texts import as_markdown, print_table

__all__ = ['RunError', 'study']


def study(options: StudyOptions, jobs: int | None = None) -> list[RunResult]:
    """Train the runs whose results are missing, and write ``tables.md``, ``results.json`` and ``study.png``.

    Every finished run is one file in ``out/runs``. A run that was interrupted is resumed from its newest checkpoint in
    ``out/checkpoints``, which is saved as often as the ``save_interval`` of the recipe says.

    Args:
        options: the runs, and the folder of the results.
        jobs: how many runs are trained side by side; if None, one per core, and one where a GPU is used.

    Returns:
        The results of all runs, seed by seed.

    Raises:
        RecipeError: a recipe, a grid or the folder is not valid, or the folder holds runs of another study.
        RunError: runs failed; the others are finished, and are in the tables.
    """
    lines: list[str] = []
    runs = plan(options, lines.append)
    with results_folder(options.out, 'runs'):
        finished = finished_runs(runs, RunResult.from_json)
        for line in dict.fromkeys(lines):
            note(line)
        by_name = {str(run.recipe.run_name): run for run in runs}
        work = partial(train_and_measure, runs=by_name, sharpness=options.sharpness)
        # From all runs, not those that are missing: the number of threads decides the last bits of a result.
        jobs, threads = share_cores([run.recipe for run in runs], jobs)
        done, failures = train_missing(runs, finished, work, jobs, threads)
        results = [done[run.name] for run in runs if run.name in done]
        if results:
            files = _report(results, options.out)
            console().print(f'{len(results)} runs; {", ".join(map(str, files))}', soft_wrap=True)
    if failures:
        raise RunError(f'{len(failures)} of {len(runs)} runs failed: {"; ".join(map(str, failures))}')
    return results


def _report(runs: list[RunResult], out: Path) -> list[Path]:
    """Print the tables, write ``tables.md``, ``results.json`` and ``study.png``, and return the files."""
    tabulated = tables(runs)
    for table in tabulated:
        print_table(table)
    results = {'about': about(runs), 'runs': [run.to_json() for run in runs]}
    write_whole(out / 'tables.md', as_markdown(about(runs), tabulated))
    write_whole(out / 'results.json', json.dumps(results, indent=1))
    write_whole(out / 'study.png', png(draw(runs)))
    return [out / name for name in ('tables.md', 'results.json', 'study.png')]

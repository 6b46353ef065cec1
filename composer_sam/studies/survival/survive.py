"""Networks trained by several recipes, and what they lose to fine-tuning, quantisation and noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from composer_sam.files import write_whole
from composer_sam.landscapes.pictures import png
from composer_sam.studies.console import console, note
from composer_sam.studies.kept import finished_runs, results_folder, train_missing
from composer_sam.studies.parallel import TRAINING, RunError, Stage, share_cores
from composer_sam.studies.result import RunResult
from composer_sam.studies.run import StudyRun
from composer_sam.studies.survival.picture import draw
from composer_sam.studies.survival.plan import OfNetwork, SurvivalOptions, network_of, plan_survival
from composer_sam.studies.survival.results import Finetuned, Measured
from composer_sam.studies.survival.tables import Survivor, survivors, tables
from composer_sam.studies.survival.work import finetune, measure, train
from composer_sam.studies.texts import as_markdown, print_table, seeds_text

__all__ = ['RunError', 'survive']

_MEASURING = Stage('{} runs measured', 'measured', 'measured')
_FINE_TUNING = Stage('{} runs fine-tuned', 'fine-tuned', 'fine-tuned')


def survive(options: SurvivalOptions, jobs: int | None = None) -> list[Survivor]:
    """Train the networks, measure and fine-tune them, and write ``tables.md``, ``results.json`` and ``survival.png``.

    Every finished piece of work is one file in ``out/runs``, ``out/measured`` or ``out/finetuned``, and is not done
    again. An interrupted training is resumed from its newest checkpoint; what else was interrupted begins anew. The
    trained networks are in ``out/networks``, in the format of ``save_pretrained``.

    Args:
        options: the recipes, and what is done to their networks.
        jobs: how many pieces are worked on side by side; if None, one per core, and one where a GPU is used.

    Returns:
        The networks that were trained and measured.

    Raises:
        RecipeError: a recipe, a grid or the folder is not valid, or the folder holds runs of another study.
        RunError: runs failed; the others are finished, and are in the tables.
    """
    lines: list[str] = []
    planned = plan_survival(options, lines.append)
    failures: list[Exception] = []
    with results_folder(options.out, 'runs', 'networks', 'measured', 'finetuned'):
        jobs, threads = share_cores([run.recipe for run in planned.trained], jobs)

        def done(
            runs: Sequence[Any], kind: Any, work: Callable[..., Any], stage: Stage, complete: Any = lambda run: True
        ) -> dict[str, Any]:
            finished = finished_runs(runs, kind, complete, stage)
            by_name = {str(run.recipe.run_name): run for run in runs}
            results, failed = train_missing(runs, finished, partial(work, runs=by_name), jobs, threads, stage)
            failures.extend(failed)
            return results

        def of_networks(runs: Sequence[OfNetwork]) -> list[OfNetwork]:
            return [run for run in runs if run.network.name in trained]

        for line in dict.fromkeys(lines):
            note(line)
        trained = done(planned.trained, RunResult.from_json, train, TRAINING, _has_network)
        trials = options.trials
        measured = done(of_networks(planned.measured), _read(Measured), partial(measure, trials=trials), _MEASURING)
        finetuned = done(
            of_networks(planned.finetuned), _read(Finetuned), partial(finetune, trials=trials), _FINE_TUNING
        )
        found = survivors(
            [trained[run.name] for run in planned.trained if run.name in trained],
            measured.values(),
            [finetuned[run.name] for run in planned.finetuned if run.name in finetuned],
        )
        if found:
            _report(found, options.out)
    if failures:
        raise RunError(f'{len(failures)} runs failed: {"; ".join(map(str, failures))}')
    return found


def _has_network(run: StudyRun) -> bool:
    return (network_of(run) / 'config.json').exists()


def _read(kind: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda found: kind(**found)


def _report(found: Sequence[Survivor], out: Path) -> None:
    """Print and write the tables, the results and the picture."""
    tabulated = tables(found)
    for table in tabulated:
        print_table(table)
    results = [
        {
            'label': one.label,
            'trained': one.run.to_json(),
            'measured': one.measured.to_json(),
            'finetuned': [tuned.to_json() for tuned in one.finetuned],
        }
        for one in found
    ]
    write_whole(out / 'tables.md', as_markdown(_about(found), tabulated))
    write_whole(out / 'results.json', json.dumps(results, indent=1))
    write_whole(out / 'survival.png', png(draw(found)))
    console().print(f'tables.md, results.json and survival.png in {out}', soft_wrap=True)


def _about(found: Sequence[Survivor]) -> str:
    """Return a sentence about the networks."""
    sequences = max(one.measured.sequences for one in found)
    return (
        f'{len(found)} networks, {seeds_text(one.run.seed for one in found)}; losses in nats per token on {sequences} '
        'test sequences; lost: the growth of the loss on the first text.'
    )

"""The command ``train``."""

from __future__ import annotations

import argparse
import os
import traceback
from typing import TYPE_CHECKING

from composer_sam.commands.terminal import (
    FAILED,
    MISTAKE,
    OK,
    Commands,
    complain,
    files_and_overrides,
    interrupted,
    is_first_process,
    note,
    say,
    starting,
)

if TYPE_CHECKING:
    from composer_sam.recipes import History, Recipe

__all__ = ['add']


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser('train', help='train one recipe', description=_train.__doc__, allow_abbrev=False)
    parser.add_argument('recipe', metavar='RECIPE', help='a YAML file, such as yamls/digits/sam.yaml')
    parser.add_argument(
        'changes', nargs='*', metavar='OVERLAY.yaml|key=value', help='merged into the recipe, files first'
    )
    parser.add_argument('--dry-run', action='store_true', help='check the recipe, print it resolved, train nothing')
    parser.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> int:
    """Train one recipe and print its accuracy and loss on the test data."""
    starting(options.recipe, in_logs=True)
    from composer_sam.recipes import Diverged, History, RecipeError, as_yaml, load_recipe, messages

    overlays, overrides = files_and_overrides(options.changes)
    history = History()
    recipe = None
    try:
        with messages(note if is_first_process() else None):
            recipe = load_recipe(options.recipe, overlays, overrides, note)
            if options.dry_run:
                say(as_yaml(recipe).rstrip())
                return OK
            if recipe.grid:
                complain(f'{recipe.name} is trained once, without its grid; composer-sam study trains the grid')
            _share_cores()
            _fit(recipe, history)
    except RecipeError as error:
        complain(str(error))
        return MISTAKE
    except FileExistsError:
        folder = None if recipe is None else recipe.save_folder
        complain(
            f'save_folder: {folder!r} holds the checkpoints of another run; choose a different one, '
            'or set autoresume=true to go on with that run, or trainer.save_overwrite=true to replace them',
        )
        return MISTAKE
    except Diverged as error:
        complain(f'training failed: {error}')
        return FAILED
    except BrokenPipeError:
        raise
    except Exception as error:
        if isinstance(error, (ValueError, ModuleNotFoundError)) and history.steps == 0:
            # Before the first step such an error is about the recipe or the installation, not about training.
            complain(str(error))
            return MISTAKE
        traceback.print_exc()
        complain(f'training failed after {history.total} steps: {type(error).__name__}: {error}')
        return FAILED
    except (KeyboardInterrupt, SystemExit) as stop:
        return interrupted(stop, _how_to_go_on(recipe, history))
    say(f'{recipe.name}: {history}')
    return OK


def _fit(recipe: Recipe, history: History) -> None:
    """Build the trainer of a recipe, say what it trains, and train it to its end."""
    from composer_sam.recipes import Progress, build_trainer, describe, is_finished, newest_checkpoint

    checkpoint = newest_checkpoint(recipe)
    trainer = build_trainer(recipe, [history, Progress()])
    try:
        note(describe(recipe, trainer))
        if (steps := trainer.state.timestamp.batch.value) > 0:
            note(f'resumed from {checkpoint or recipe.load_path} at step {steps}')
        if not is_finished(trainer.state):  # a finished run that is resumed has no step left
            trainer.fit()
        if not history.test['epoch']:
            trainer.eval()
    finally:
        trainer.close()


def _how_to_go_on(recipe: Recipe | None, history: History) -> str:
    if recipe is None or history.total == 0:
        return ''
    kept = recipe.save_folder is not None
    return f' after {history.total} steps{"; autoresume=true goes on from the newest checkpoint" if kept else ""}'


def _share_cores() -> None:
    """Divide the cores among the training processes of this machine, unless OMP_NUM_THREADS is set.

    Otherwise torch starts as many threads as there are cores in every process.
    """
    import torch

    processes = int(os.environ.get('LOCAL_WORLD_SIZE', '1'))
    if processes > 1 and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))

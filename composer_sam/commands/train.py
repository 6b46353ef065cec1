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
from composer_sam.files import disk_full

if TYPE_CHECKING:
    from composer_sam.recipes import History, Recipe
    from composer_sam.recipes.preemption import Preemption

__all__ = ['add']


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser('train', help='train one recipe', description=_train.__doc__, allow_abbrev=False)
    parser.add_argument('recipe', metavar='RECIPE', help='a YAML file, or a name that recipes lists, as digits/sam')
    parser.add_argument('changes', nargs='*', metavar='OVERLAY|key=value', help='merged into the recipe, files first')
    parser.add_argument('--dry-run', action='store_true', help='check the recipe, print it resolved, train nothing')
    parser.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> int:
    """Train one recipe and print its accuracy and loss on the test data.

    On SIGTERM, by which clusters announce that they take a machine back, all processes end after the batch under way
    with exit code 143, and with a checkpoint of this step where there is a save_folder. A process whose batch,
    evaluation or checkpoint takes longer than 14 seconds from then on ends without one.
    """
    starting(options.recipe, in_logs=True)
    from composer_sam.recipes.preemption import Preemption

    preemption = Preemption()
    with preemption.listening():
        return _train_until(preemption, options)


def _train_until(preemption: Preemption, options: argparse.Namespace) -> int:
    """Train one recipe to its end or until it is told to stop, and return the exit code."""
    from composer_sam.recipes import Diverged, History, RecipeError, as_yaml, load_recipe, messages
    from composer_sam.recipes.save_folder import hold_folder

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
            with hold_folder(recipe):
                _fit(recipe, history, preemption)
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
        if (full := disk_full(error)) is not None:
            complain(f'training failed after {history.total} steps: {full}')
            return FAILED
        traceback.print_exc()
        complain(f'training failed after {history.total} steps: {type(error).__name__}: {error}')
        return FAILED
    except (KeyboardInterrupt, SystemExit) as stop:
        return interrupted(stop, _how_to_go_on(recipe, history, preemption))
    say(f'{recipe.name}: {history}')
    return OK


def _fit(recipe: Recipe, history: History, preemption: Preemption) -> None:
    """Build the trainer of a recipe, say what it trains, and train it to its end."""
    from composer_sam.recipes import Progress, build_trainer, describe, is_finished, newest_checkpoint

    checkpoint = newest_checkpoint(recipe)
    trainer = build_trainer(recipe, [history, Progress(), preemption])
    try:
        note(describe(recipe, trainer))
        if (steps := trainer.state.timestamp.batch.value) > 0:
            note(f'resumed from {checkpoint or recipe.load_path} at step {steps}')
        if not is_finished(trainer.state):  # a finished run that is resumed has no step left
            trainer.fit()
        if not history.test['epoch']:
            trainer.eval()
    except BaseException:
        # trainer.close() would wait for the other processes, and they may wait for this one, in training.
        trainer.engine.close()
        raise
    trainer.close()


def _how_to_go_on(recipe: Recipe | None, history: History, preemption: Preemption) -> str:
    """Return how far the run came and how to go on from there, to follow on that it was stopped."""
    if recipe is None or history.total == 0:
        return ''
    from composer_sam.recipes.save_folder import folder_of

    after = f' after {history.total} steps'
    folder = folder_of(recipe)
    if preemption.saved and folder is not None:
        return f'{after}; the checkpoint of step {history.total} is in {folder}: autoresume=true goes on from it'
    if preemption.saved:
        return f'{after}; callbacks.checkpoint_saver has saved step {history.total}: load_path goes on from it'
    if folder is not None:
        return f'{after}; autoresume=true goes on from the newest checkpoint'
    if preemption.saved is False:
        return f'{after}; nothing was saved: save_folder=FOLDER and autoresume=true would let it go on'
    return after


def _share_cores() -> None:
    """Divide the cores among the training processes of this machine, unless OMP_NUM_THREADS is set.

    Otherwise torch starts as many threads as there are cores in every process.
    """
    import torch

    processes = int(os.environ.get('LOCAL_WORLD_SIZE', '1'))
    if processes > 1 and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))

"""The command ``train``."""

from __future__ import annotations

import argparse
import os
import traceback

from composer_sam.commands.terminal import FAILED, MISTAKE, OK, Commands, complain, files_and_overrides, say

__all__ = ['add']


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser('train', help='train one recipe', description=_train.__doc__, allow_abbrev=False)
    parser.add_argument('recipe', metavar='RECIPE', help='a YAML file, such as yamls/digits/sam.yaml')
    parser.add_argument(
        'changes', nargs='*', metavar='OVERLAY.yaml|key=value', help='merged into the recipe, files first'
    )
    parser.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> int:
    """Train one recipe and print its accuracy and loss on the test data."""
    from composer_sam.recipes import History, RecipeError, build_trainer, is_finished, load_recipe

    overlays, overrides = files_and_overrides(options.changes)
    trainer = None
    history = History()
    try:
        recipe = load_recipe(options.recipe, overlays, overrides)
        if recipe.grid:
            complain(f'{recipe.name} is trained once, without its grid; composer-sam study trains the grid')
        _share_cores()
        trainer = build_trainer(recipe, [history])
        if not is_finished(trainer.state):  # a finished run that is resumed has no step left
            trainer.fit()
        if not history.test['epoch']:
            trainer.eval()
    except RecipeError as error:
        complain(str(error))
        return MISTAKE
    except FileExistsError:
        complain(
            f'save_folder: {recipe.save_folder!r} holds the checkpoints of another run; choose a different one, '
            'or set autoresume=true to go on with that run, or trainer.save_overwrite=true to replace them',
        )
        return MISTAKE
    except Exception as error:
        if isinstance(error, (ValueError, ModuleNotFoundError)) and history.steps == 0:
            # Before the first step such an error is about the recipe or the installation, not about training.
            complain(str(error))
            return MISTAKE
        traceback.print_exc()
        complain(f'training failed after {history.steps} steps: {type(error).__name__}: {error}')
        return FAILED
    finally:
        if trainer is not None:
            trainer.close()
    say(f'{recipe.name}: {history}')
    return OK


def _share_cores() -> None:
    """Divide the cores among the training processes of this machine, unless OMP_NUM_THREADS is set.

    Otherwise torch starts as many threads as there are cores in every process.
    """
    import torch

    processes = int(os.environ.get('LOCAL_WORLD_SIZE', '1'))
    if processes > 1 and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))

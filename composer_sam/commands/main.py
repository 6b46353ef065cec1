"""The ``composer-sam`` command: train a recipe, compare recipes, look at what came of them, list the methods."""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer_sam.commands.checkpoints import add_landscape, add_sharpness
from composer_sam.commands.terminal import FAILED, INTERRUPTED, MISTAKE, OK, complain, positive, refuse_launcher, say

# Composer takes seconds to import, so every command imports what it needs: --help and typing mistakes answer at once.

__all__ = ['main']


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: What follows the program's name; the process's own if not given.

    Returns:
        0 if all went well, 1 if training failed, 2 for a mistake of the user's, 130 if interrupted.
    """
    parser = _parser()
    try:
        options, further = parser.parse_known_args(arguments)
        # argparse leaves over what follows an option, as key=value in: compare A.yaml B.yaml --seeds 3 key=value
        if any(argument.startswith('-') for argument in further) or (further and 'changes' not in options):
            parser.error(f'unrecognized arguments: {" ".join(further)}')
    except SystemExit as stop:  # argparse ends the process, which a caller from Python cannot want
        return stop.code if isinstance(stop.code, int) else MISTAKE
    if further:
        options.changes += further
    try:
        return options.command(options)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as stop:  # what Composer makes of an interrupt and of being told to terminate
        code = stop.code if isinstance(stop.code, int) else FAILED
    complain('interrupted')
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='composer-sam',
        description='Sharpness-aware training with MosaicML Composer.',
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    train = commands.add_parser('train', help='train one recipe', description=_train.__doc__, allow_abbrev=False)
    train.add_argument('recipe', metavar='RECIPE', help='a YAML file, such as yamls/digits/sam.yaml')
    train.add_argument('changes', nargs='*', metavar='OVERLAY.yaml|key=value', help='laid over the recipe, files first')
    train.set_defaults(command=_train)

    compare = commands.add_parser(
        'compare',
        help='train several recipes with several seeds and compare them',
        description=_compare.__doc__,
        allow_abbrev=False,
    )
    compare.add_argument('changes', nargs='+', metavar='RECIPE|key=value', help='YAML files; overrides go to all')
    compare.add_argument('--seeds', type=positive, default=1, metavar='N', help='runs per recipe (default: 1)')
    compare.add_argument('--jobs', type=positive, metavar='N', help='runs side by side (default: cores; 1 on a GPU)')
    compare.add_argument('--out', type=Path, default=Path('comparison'), metavar='DIR', help='default: comparison')
    compare.add_argument('--sharpness', action='store_true', help='measure every trained network')
    compare.add_argument('--landscape', action='store_true', help="draw the loss around every recipe's first network")
    compare.set_defaults(command=_compare)

    _add_study(commands)
    add_landscape(commands)
    add_sharpness(commands)

    methods = commands.add_parser('methods', help='list the methods', description=_methods.__doc__)
    methods.set_defaults(command=_methods)
    return parser


def _add_study(commands: Any) -> None:
    parser = commands.add_parser(
        'study',
        help='train grids of recipes, values and seeds, and tabulate them',
        description=_study.__doc__,
        allow_abbrev=False,
    )
    parser.add_argument('changes', nargs='+', metavar='RECIPE|key=value', help='YAML files; overrides go to all')
    parser.add_argument('--grid', action='append', default=[], metavar='KEY=V,V', help='for recipes that have the key')
    parser.add_argument('--seeds', type=positive, default=1, metavar='N', help='runs at every point (default: 1)')
    parser.add_argument('--jobs', type=positive, metavar='N', help='runs side by side (default: cores; 1 on a GPU)')
    parser.add_argument('--out', type=Path, default=Path('study'), metavar='DIR', help='default: study')
    parser.add_argument('--samples', type=positive, default=512, metavar='N', help='for sharpness (default: 512)')
    parser.add_argument('--no-sharpness', action='store_true', help='do not measure the trained networks')
    parser.add_argument('--keep-checkpoints', action='store_true', help='also when a run is done')
    parser.set_defaults(command=_study)


def _train(options: argparse.Namespace) -> int:
    """Trains one recipe and prints how well it does on the test data."""
    from composer_sam.recipes import History, RecipeError, build_trainer, is_finished, load_recipe

    overlays, overrides = _separated(options.changes)
    trainer = None
    history = History()
    try:
        recipe = load_recipe(options.recipe, overlays, overrides)
        if recipe.grid:
            complain(f'{recipe.name} is trained at one point; its grid is what composer-sam study trains')
        _share_cores()
        trainer = build_trainer(recipe, [history])
        if not is_finished(trainer.state):  # as it is where a run that had come to its end is resumed
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
        if isinstance(error, ValueError) and history.steps == 0:
            # Before the first step a ValueError is about what the recipe asks for, not about how training went.
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


def _compare(options: argparse.Namespace) -> int:
    """Trains several recipes, prints a table of the results and writes a picture of the curves."""
    if (code := refuse_launcher('compare')) != OK:
        return code
    from composer_sam.recipes import RecipeError
    from composer_sam.studies.compare import RunError, compare

    recipes, overrides = _separated(options.changes)
    try:
        compare(recipes, overrides, options.seeds, options.out, options.jobs, options.sharpness, options.landscape)
    except RecipeError as error:
        complain(str(error))
        return MISTAKE
    except RunError as error:
        complain(str(error))
        return FAILED
    return OK


def _study(options: argparse.Namespace) -> int:
    """Trains recipes at every point of their grids with several seeds, measures them and writes the tables.

    What the output directory holds is not trained again; a run that was cut off goes on from its checkpoint.
    """
    if (code := refuse_launcher('study')) != OK:
        return code
    from composer_sam.recipes import RecipeError
    from composer_sam.studies.study import RunError, Sharpness, study

    recipes, overrides = _separated(options.changes)
    sharpness = None if options.no_sharpness else Sharpness(options.samples)
    try:
        study(
            *(recipes, overrides, options.grid, options.seeds, options.out),
            *(options.jobs, sharpness, options.keep_checkpoints),
        )
    except RecipeError as error:
        complain(str(error))
        return MISTAKE
    except RunError as error:
        complain(str(error))
        return FAILED
    return OK


def _methods(options: argparse.Namespace) -> int:
    """Lists the methods, what a step of each costs, their hyper-parameters and where they were published."""
    del options
    from composer_sam.methods import table

    # Not folded to the terminal's width, so that papers' addresses stay whole.
    line = '{:<14}{:<8}{:<14}{:<13}{}'
    print(line.format('name', 'passes', 'extra-memory', 'collectives', 'paper'))
    for row in table():
        memory = f'{row["extra_copies"]} x weights'
        print(line.format(row['name'], row['passes'], memory, row['collectives'], row['paper']))
        print('  ' + ', '.join(f'{name}={default!r}' for name, default in row['hyperparameters'].items()))
    return OK


def _separated(changes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files, and what overrides keys in them."""
    from composer_sam.recipes import is_override

    return [c for c in changes if not is_override(c)], [c for c in changes if is_override(c)]


def _share_cores() -> None:
    """Divides the machine's cores among its training processes, unless OMP_NUM_THREADS says otherwise.

    torch would start as many threads as there are cores in every one of them.
    """
    import torch

    processes = int(os.environ.get('LOCAL_WORLD_SIZE', '1'))
    if processes > 1 and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))

"""The ``composer-sam`` command: train a recipe, compare recipes, look at what came of them, list the methods."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer_sam.recipes import Recipe

# Composer takes seconds to import, so every command imports what it needs: --help and typing mistakes answer at once.

__all__ = ['main']

OK, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130


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
    _complain('interrupted')
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
    compare.add_argument('--seeds', type=_positive, default=1, metavar='N', help='runs per recipe (default: 1)')
    compare.add_argument('--jobs', type=_positive, metavar='N', help='runs side by side (default: cores; 1 on a GPU)')
    compare.add_argument('--out', type=Path, default=Path('comparison'), metavar='DIR', help='default: comparison')
    compare.add_argument('--sharpness', action='store_true', help='measure every trained network')
    compare.add_argument('--landscape', action='store_true', help="draw the loss around every recipe's first network")
    compare.set_defaults(command=_compare)

    _add_study(commands)
    _add_landscape(commands)
    _add_sharpness(commands)

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
    parser.add_argument('--seeds', type=_positive, default=1, metavar='N', help='runs at every point (default: 1)')
    parser.add_argument('--jobs', type=_positive, metavar='N', help='runs side by side (default: cores; 1 on a GPU)')
    parser.add_argument('--out', type=Path, default=Path('study'), metavar='DIR', help='default: study')
    parser.add_argument('--samples', type=_positive, default=512, metavar='N', help='for sharpness (default: 512)')
    parser.add_argument('--no-sharpness', action='store_true', help='do not measure the trained networks')
    parser.add_argument('--keep-checkpoints', action='store_true', help='also when a run is done')
    parser.set_defaults(command=_study)


def _add_landscape(commands: Any) -> None:
    parser = commands.add_parser(
        'landscape',
        help='draw the loss around checkpoints, or between them',
        description=_landscape.__doc__,
        allow_abbrev=False,
    )
    _add_checkpoints(parser)
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='for pictures and numbers')
    parser.add_argument(
        '--directions',
        choices=('random', 'hessian', 'checkpoints'),
        default='random',
        help='random and filter-normalised (default), eigenvectors of the Hessian, or from checkpoint to checkpoint',
    )
    parser.add_argument('--dims', type=int, choices=(1, 2), default=2, help='a curve or a surface (default: 2)')
    parser.add_argument('--resolution', type=int, default=25, metavar='N', help='points per axis (default: 25)')
    parser.add_argument(
        '--range',
        type=float,
        metavar='R',
        help='from -R to R (default: 1); how far beyond the checkpoints, in parts of their distance (default: 0.25)',
    )
    parser.add_argument('--seed', type=_natural, default=0, metavar='N', help='of random directions (default: 0)')
    parser.add_argument('--jobs', type=_positive, metavar='N', help='processes (default: by how long one needs)')
    parser.add_argument(
        '--batchnorm',
        choices=('interpolate', 'recalibrate'),
        default='interpolate',
        help='running statistics between checkpoints: their average (default), or gathered anew at every point',
    )
    parser.set_defaults(command=_landscape)


def _add_sharpness(commands: Any) -> None:
    parser = commands.add_parser(
        'sharpness',
        help='measure how sharp the loss is at checkpoints',
        description=_sharpness.__doc__,
        allow_abbrev=False,
    )
    _add_checkpoints(parser)
    parser.add_argument('--k', type=_positive, default=1, metavar='N', help='eigenvalues (default: 1)')
    parser.add_argument('--rho', type=float, default=0.05, metavar='R', help='radius of SAM sharpness (default: 0.05)')
    parser.add_argument('--out', type=Path, metavar='FILE.json', help='for the numbers')
    parser.set_defaults(command=_sharpness)


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('changes', nargs='+', metavar='CHECKPOINT|key=value', help='.pt files; overrides of the recipe')
    parser.add_argument('--recipe', required=True, metavar='RECIPE', help='the YAML file they were trained with')
    parser.add_argument('--labels', metavar='A,B', help='what they are called (default: by file or folder)')
    parser.add_argument('--samples', type=_positive, default=512, metavar='N', help='default: 512')
    parser.add_argument('--split', choices=('train', 'test'), default='train', help='default: train')


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f'must be an integer >= 0, got {text!r}')
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be an integer >= 1, got {text!r}')
    return int(text)


def _train(options: argparse.Namespace) -> int:
    """Trains one recipe and prints how well it does on the test data."""
    from composer_sam.recipes import History, RecipeError, build_trainer, is_finished, is_override, load_recipe

    overlays = [change for change in options.changes if not is_override(change)]
    overrides = [change for change in options.changes if is_override(change)]
    trainer = None
    history = History()
    try:
        recipe = load_recipe(options.recipe, overlays, overrides)
        if recipe.grid:
            _complain(f'{recipe.name} is trained at one point; its grid is what composer-sam study trains')
        _share_cores()
        trainer = build_trainer(recipe, [history])
        if not is_finished(trainer.state):  # as it is where a run that had come to its end is resumed
            trainer.fit()
        if not history.test['epoch']:
            trainer.eval()
    except RecipeError as error:
        _complain(str(error))
        return MISTAKE
    except FileExistsError:
        _complain(
            f'save_folder: {recipe.save_folder!r} holds the checkpoints of another run; choose a different one, '
            'or set autoresume=true to go on with that run, or trainer.save_overwrite=true to replace them',
        )
        return MISTAKE
    except Exception as error:
        if isinstance(error, ValueError) and history.steps == 0:
            # Before the first step a ValueError is about what the recipe asks for, not about how training went.
            _complain(str(error))
            return MISTAKE
        traceback.print_exc()
        _complain(f'training failed after {history.steps} steps: {type(error).__name__}: {error}')
        return FAILED
    finally:
        if trainer is not None:
            trainer.close()
    _say(f'{recipe.name}: {history}')
    return OK


def _compare(options: argparse.Namespace) -> int:
    """Trains several recipes, prints a table of the results and writes a picture of the curves."""
    if (code := _refuse_launcher('compare')) != OK:
        return code
    from composer_sam.compare import RunError, compare
    from composer_sam.recipes import RecipeError, is_override

    recipes = [argument for argument in options.changes if not is_override(argument)]
    overrides = [argument for argument in options.changes if is_override(argument)]
    try:
        compare(recipes, overrides, options.seeds, options.out, options.jobs, options.sharpness, options.landscape)
    except RecipeError as error:
        _complain(str(error))
        return MISTAKE
    except RunError as error:
        _complain(str(error))
        return FAILED
    return OK


def _study(options: argparse.Namespace) -> int:
    """Trains recipes at every point of their grids with several seeds, measures them and writes the tables.

    What the output directory holds is not trained again; a run that was cut off goes on from its checkpoint.
    """
    if (code := _refuse_launcher('study')) != OK:
        return code
    from composer_sam.recipes import RecipeError, is_override
    from composer_sam.study import RunError, Sharpness, study

    recipes = [argument for argument in options.changes if not is_override(argument)]
    overrides = [argument for argument in options.changes if is_override(argument)]
    sharpness = None if options.no_sharpness else Sharpness(options.samples)
    try:
        study(
            *(recipes, overrides, options.grid, options.seeds, options.out),
            *(options.jobs, sharpness, options.keep_checkpoints),
        )
    except RecipeError as error:
        _complain(str(error))
        return MISTAKE
    except RunError as error:
        _complain(str(error))
        return FAILED
    return OK


def _landscape(options: argparse.Namespace) -> int:
    """Evaluates the loss on a grid of weights around checkpoints, or between them, and draws it.

    Every finished row is stored: a run that was killed goes on where it stopped.
    """
    if (code := _refuse_launcher('landscape')) != OK:
        return code
    from composer_sam.diagnostics.checkpoints import Request, landscapes
    from composer_sam.diagnostics.report import console, progress_bar, tabulate_landscapes, write_pictures

    try:
        paths, labels, recipe = _checkpoints(options)
        request = Request(
            paths=paths,
            labels=labels,
            directions=options.directions,
            dims=options.dims,
            resolution=options.resolution,
            reach=options.range if options.range is not None else 0.25 if options.directions == 'checkpoints' else 1.0,
            split=options.split,
            samples=options.samples,
            seed=options.seed,
            batchnorm=options.batchnorm,
        )
        _check_folder(options.out)
        with progress_bar('rows') as progress:
            found = landscapes(request, recipe, options.out, options.jobs, progress)
        files = write_pictures(found, request, options.out)
    except ValueError as error:
        _complain(str(error))
        return MISTAKE
    except Exception as error:
        return _fail('landscape', error)
    console().print(tabulate_landscapes(found))
    console().print(f'{", ".join(map(str, files))}; numbers in {options.out}/*.npz', soft_wrap=True)
    return OK


def _sharpness(options: argparse.Namespace) -> int:
    """Measures the loss around checkpoints: eigenvalues and trace of the Hessian, and sharpness within a radius."""
    if (code := _refuse_launcher('sharpness')) != OK:
        return code
    from composer_sam.diagnostics.checkpoints import measurements
    from composer_sam.diagnostics.report import console, progress_bar, tabulate_measurements

    try:
        if not 0 < options.rho < math.inf:
            raise ValueError(f'--rho must be a number > 0, got {options.rho}')
        paths, labels, recipe = _checkpoints(options)
        if options.out is not None:
            _check_folder(options.out.parent)
        with progress_bar('checkpoints') as progress:
            rows = measurements(
                recipe,
                paths,
                labels,
                split=options.split,
                samples=options.samples,
                progress=progress,
                k=options.k,
                rho=options.rho,
            )
        if options.out is not None:
            options.out.write_text(json.dumps(rows, indent=1))
    except ValueError as error:
        _complain(str(error))
        return MISTAKE
    except Exception as error:
        return _fail('sharpness', error)
    console().print(tabulate_measurements(rows))
    console().print(
        f'{rows[0]["samples"]} samples of the {options.split} data; λ: largest eigenvalues of the Hessian; '
        f'sharpness: growth of the loss within rho {options.rho:g}',
        soft_wrap=True,
    )
    return OK


def _checkpoints(options: argparse.Namespace) -> tuple[tuple[Path, ...], tuple[str, ...], Recipe]:
    """The checkpoints named on the command line, what they are called, and their recipe."""
    from composer_sam.diagnostics.checkpoints import check_files, default_labels
    from composer_sam.recipes import is_override, load_recipe

    paths = tuple(Path(argument) for argument in options.changes if not is_override(argument))
    overrides = [argument for argument in options.changes if is_override(argument)]
    check_files(paths)
    labels = default_labels(paths) if options.labels is None else options.labels.split(',')
    if len(labels) != len(paths) or len(set(labels)) != len(labels) or '' in labels:
        raise ValueError(f'--labels: {len(paths)} different names are needed, by commas, got {options.labels!r}')
    return paths, tuple(labels), load_recipe(options.recipe, (), overrides)


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f'--out: {str(folder)!r} cannot be written: {error.strerror}') from None


def _refuse_launcher(command: str) -> int:
    if int(os.environ.get('WORLD_SIZE', '1')) == 1:
        return OK
    _complain(f'{command} starts its own processes; run it without the launcher')
    return MISTAKE


def _fail(command: str, error: Exception) -> int:
    traceback.print_exception(error)
    _complain(f'{command} failed: {type(error).__name__}: {error}')
    return FAILED


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


def _share_cores() -> None:
    """Divides the machine's cores among its training processes, unless OMP_NUM_THREADS says otherwise.

    torch would start as many threads as there are cores in every one of them.
    """
    import torch

    processes = int(os.environ.get('LOCAL_WORLD_SIZE', '1'))
    if processes > 1 and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def _is_first_process() -> bool:
    return int(os.environ.get('RANK', '0')) == 0


def _say(message: str) -> None:
    if _is_first_process():
        print(message)


def _complain(message: str) -> None:
    if _is_first_process():
        print(f'composer-sam: {" ".join(message.split())}', file=sys.stderr)

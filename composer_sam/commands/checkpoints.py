"""The commands that evaluate checkpoints: ``landscape`` and ``sharpness``."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from composer_sam.commands.terminal import (
    FAILED,
    MISTAKE,
    OK,
    Commands,
    check_folder,
    complain,
    fail,
    files_and_overrides,
    natural,
    positive,
    refuse_launcher,
    starting,
)
from composer_sam.files import holding, write_whole

if TYPE_CHECKING:
    from composer_sam.recipes import Recipe

__all__ = ['add']


def add(commands: Commands) -> None:
    """Add both commands to the parser."""
    landscape = commands.add_parser(
        'landscape',
        help='draw the loss around checkpoints, or between them',
        description=_landscape.__doc__,
        allow_abbrev=False,
    )
    _add_checkpoints(landscape)
    landscape.add_argument('--out', type=Path, required=True, metavar='DIR', help='for pictures and numbers')
    landscape.add_argument(
        '--directions',
        choices=('random', 'hessian', 'checkpoints'),
        default='random',
        help='random filter-normalised (default), eigenvectors of the Hessian, or through the checkpoints',
    )
    landscape.add_argument('--dims', type=int, choices=(1, 2), default=2, help='a curve or a surface (default: 2)')
    landscape.add_argument('--resolution', type=int, default=25, metavar='N', help='points per axis (default: 25)')
    landscape.add_argument(
        '--range',
        type=float,
        metavar='R',
        help='from -R to R (default: 1); with --directions checkpoints the margin beyond the checkpoints as a fraction '
        'of their distance (default: 0.25)',
    )
    landscape.add_argument('--seed', type=natural, default=0, metavar='N', help='of random directions (default: 0)')
    landscape.add_argument('--jobs', type=positive, metavar='N', help='processes (default: by the estimated time)')
    landscape.add_argument(
        '--batchnorm',
        choices=('interpolate', 'recalibrate'),
        default='interpolate',
        help='running statistics between checkpoints: averaged (default), or computed again at every point',
    )
    landscape.set_defaults(command=_landscape)

    sharpness = commands.add_parser(
        'sharpness',
        help='measure the sharpness of the loss at checkpoints',
        description=_sharpness.__doc__,
        allow_abbrev=False,
    )
    _add_checkpoints(sharpness)
    sharpness.add_argument('--k', type=positive, default=1, metavar='N', help='eigenvalues (default: 1)')
    sharpness.add_argument('--rho', type=float, default=0.05, metavar='R', help='radius of sharpness (default: 0.05)')
    sharpness.add_argument('--out', type=Path, metavar='FILE.json', help='for the numbers')
    sharpness.set_defaults(command=_sharpness)


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('changes', nargs='+', metavar='CHECKPOINT|key=value', help='.pt files; overrides of the recipe')
    parser.add_argument(
        '--recipe',
        metavar='RECIPE',
        help='the YAML file they were trained with, or its name (default: the config.yaml beside the first checkpoint, '
        'which must name no function)',
    )
    parser.add_argument('--labels', metavar='A,B', help='names of the checkpoints (default: from file or folder)')
    parser.add_argument('--samples', type=positive, default=512, metavar='N', help='default: 512')
    parser.add_argument('--split', choices=('train', 'test'), default='train', help='default: train')


def _landscape(options: argparse.Namespace) -> int:
    """Evaluate and draw the loss on a grid of weights around checkpoints, or between them.

    Every finished row is stored; the same command continues an interrupted run.
    """
    if (code := refuse_launcher('landscape')) != OK:
        return code
    starting('landscape')
    from composer_sam.studies.console import console, progress_bar
    from composer_sam.studies.landscape import Request, landscapes
    from composer_sam.studies.report import tabulate_landscapes, write_pictures

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
        check_folder(options.out)
        with holding(options.out):
            with progress_bar('rows') as progress:
                found = landscapes(request, recipe, options.out, options.jobs, progress)
            console().print(tabulate_landscapes(found))
            files = write_pictures(found, request, options.out)
    except (ValueError, ModuleNotFoundError) as error:
        complain(str(error))
        return MISTAKE
    except BrokenPipeError:
        raise
    except OSError as error:
        complain(f'landscape failed: {error}')
        return FAILED
    except Exception as error:
        return fail('landscape', error)
    console().print(f'{", ".join(map(str, files))}; numbers in {options.out}/*.npz', soft_wrap=True)
    return OK


def _sharpness(options: argparse.Namespace) -> int:
    """Measure the loss around checkpoints: eigenvalues and trace of the Hessian, and the growth within a radius."""
    if (code := refuse_launcher('sharpness')) != OK:
        return code
    starting('sharpness')
    from composer_sam.studies.console import console, progress_bar
    from composer_sam.studies.report import tabulate_measurements
    from composer_sam.studies.sharpness import measure_checkpoints

    try:
        if not 0 < options.rho < math.inf:
            raise ValueError(f'--rho must be a number > 0, got {options.rho}')
        paths, labels, recipe = _checkpoints(options)
        if options.out is not None:
            check_folder(options.out.parent)
        with progress_bar('checkpoints') as progress:
            rows = measure_checkpoints(
                recipe,
                paths,
                labels,
                split=options.split,
                samples=options.samples,
                progress=progress,
                k=options.k,
                rho=options.rho,
            )
        console().print(tabulate_measurements(rows))
        if options.out is not None:
            write_whole(options.out, json.dumps([row.as_dict() for row in rows], indent=1))
    except (ValueError, ModuleNotFoundError) as error:
        complain(str(error))
        return MISTAKE
    except BrokenPipeError:
        raise
    except OSError as error:
        complain(f'sharpness failed: {error}')
        return FAILED
    except Exception as error:
        return fail('sharpness', error)
    console().print(
        f'{rows[0].measurements.samples} samples of the {options.split} data; λ: largest eigenvalues of the Hessian; '
        f'sharpness: growth of the loss within rho {options.rho:g}',
        soft_wrap=True,
    )
    return OK


def _checkpoints(options: argparse.Namespace) -> tuple[tuple[Path, ...], tuple[str, ...], Recipe]:
    """Return the checkpoints named on the command line, their labels and their recipe."""
    from composer_sam.recipes import load_recipe
    from composer_sam.studies.checkpoints import check_files, check_labels, default_labels
    from composer_sam.studies.problem import KEYS

    files, overrides = files_and_overrides(options.changes)
    paths = tuple(map(Path, files))
    check_files(paths)
    labels = default_labels(paths) if options.labels is None else options.labels.split(',')
    if len(labels) != len(paths) or len(set(labels)) != len(labels) or '' in labels:
        raise ValueError(f'--labels: {len(paths)} different names are needed, by commas, got {options.labels!r}')
    check_labels(labels)
    if options.recipe is not None:
        return paths, tuple(labels), load_recipe(options.recipe, (), overrides, keys=KEYS)
    # A checkpoint can be a stranger's, and what lies beside it too.
    return paths, tuple(labels), load_recipe(_beside(paths[0]), (), overrides, keys=KEYS, code=False)


def _beside(checkpoint: Path) -> Path:
    """Return the recipe that training with a save_folder leaves beside its checkpoints."""
    config = checkpoint.parent / 'config.yaml'
    if not config.is_file():
        raise ValueError(f'--recipe: there is no {config} beside the checkpoint; give the recipe it was trained with')
    return config

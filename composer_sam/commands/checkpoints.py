"""The commands that look at checkpoints: ``landscape`` and ``sharpness``."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_sam.commands.terminal import MISTAKE, OK, complain, fail, natural, positive, refuse_launcher

if TYPE_CHECKING:
    from composer_sam.recipes import Recipe

__all__ = ['add_landscape', 'add_sharpness']


def add_landscape(commands: Any) -> None:
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
    parser.add_argument('--seed', type=natural, default=0, metavar='N', help='of random directions (default: 0)')
    parser.add_argument('--jobs', type=positive, metavar='N', help='processes (default: by how long one needs)')
    parser.add_argument(
        '--batchnorm',
        choices=('interpolate', 'recalibrate'),
        default='interpolate',
        help='running statistics between checkpoints: their average (default), or gathered anew at every point',
    )
    parser.set_defaults(command=_landscape)


def add_sharpness(commands: Any) -> None:
    parser = commands.add_parser(
        'sharpness',
        help='measure how sharp the loss is at checkpoints',
        description=_sharpness.__doc__,
        allow_abbrev=False,
    )
    _add_checkpoints(parser)
    parser.add_argument('--k', type=positive, default=1, metavar='N', help='eigenvalues (default: 1)')
    parser.add_argument('--rho', type=float, default=0.05, metavar='R', help='radius of SAM sharpness (default: 0.05)')
    parser.add_argument('--out', type=Path, metavar='FILE.json', help='for the numbers')
    parser.set_defaults(command=_sharpness)


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('changes', nargs='+', metavar='CHECKPOINT|key=value', help='.pt files; overrides of the recipe')
    parser.add_argument('--recipe', required=True, metavar='RECIPE', help='the YAML file they were trained with')
    parser.add_argument('--labels', metavar='A,B', help='what they are called (default: by file or folder)')
    parser.add_argument('--samples', type=positive, default=512, metavar='N', help='default: 512')
    parser.add_argument('--split', choices=('train', 'test'), default='train', help='default: train')


def _landscape(options: argparse.Namespace) -> int:
    """Evaluates the loss on a grid of weights around checkpoints, or between them, and draws it.

    Every finished row is stored: a run that was killed goes on where it stopped.
    """
    if (code := refuse_launcher('landscape')) != OK:
        return code
    from composer_sam.studies.checkpoints import Request, landscapes
    from composer_sam.studies.report import console, progress_bar, tabulate_landscapes, write_pictures

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
        complain(str(error))
        return MISTAKE
    except Exception as error:
        return fail('landscape', error)
    console().print(tabulate_landscapes(found))
    console().print(f'{", ".join(map(str, files))}; numbers in {options.out}/*.npz', soft_wrap=True)
    return OK


def _sharpness(options: argparse.Namespace) -> int:
    """Measures the loss around checkpoints: eigenvalues and trace of the Hessian, and sharpness within a radius."""
    if (code := refuse_launcher('sharpness')) != OK:
        return code
    from composer_sam.studies.checkpoints import measurements
    from composer_sam.studies.report import console, progress_bar, tabulate_measurements

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
        complain(str(error))
        return MISTAKE
    except Exception as error:
        return fail('sharpness', error)
    console().print(tabulate_measurements(rows))
    console().print(
        f'{rows[0]["samples"]} samples of the {options.split} data; λ: largest eigenvalues of the Hessian; '
        f'sharpness: growth of the loss within rho {options.rho:g}',
        soft_wrap=True,
    )
    return OK


def _checkpoints(options: argparse.Namespace) -> tuple[tuple[Path, ...], tuple[str, ...], Recipe]:
    """The checkpoints named on the command line, what they are called, and their recipe."""
    from composer_sam.recipes import is_override, load_recipe
    from composer_sam.studies.checkpoints import check_files, default_labels

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

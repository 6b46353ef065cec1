"""The commands that train several runs: ``compare``, ``demo``, ``study`` and ``survive``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from composer_sam import shipped
from composer_sam.commands.terminal import (
    FAILED,
    MISTAKE,
    OK,
    Commands,
    complain,
    files_and_overrides,
    positive,
    refuse_launcher,
    starting,
)
from composer_sam.extras import extra

__all__ = ['DEMO', 'add']

DEMO = ('digits/sgd', 'digits/sgd_early', 'digits/sam')


def add(commands: Commands) -> None:
    """Add the commands to the parser."""
    compare = commands.add_parser(
        'compare',
        help='train several recipes with several seeds and compare them',
        description=_compare.__doc__,
        allow_abbrev=False,
    )
    _add_runs(compare, 'comparison')
    compare.add_argument('--sharpness', action='store_true', help='measure the sharpness of every trained network')
    compare.add_argument('--landscape', action='store_true', help="draw the loss around every recipe's first network")
    compare.set_defaults(command=_compare)

    demo = commands.add_parser(
        'demo',
        help='see on handwritten digits what SAM does, in about two minutes on two cores',
        description=_demo.__doc__,
        allow_abbrev=False,
    )
    demo.add_argument('changes', nargs='*', metavar='key=value', help='overrides of all three recipes')
    _add_options(demo, 'demo', seeds=3)
    demo.set_defaults(command=_demo)

    study = commands.add_parser(
        'study',
        help='train grids of recipes, values and seeds, and tabulate them',
        description=_study.__doc__,
        allow_abbrev=False,
    )
    _add_runs(study, 'study')
    study.add_argument('--grid', action='append', default=[], metavar='KEY=V,V', help='for the recipes with this key')
    study.add_argument('--samples', type=positive, default=512, metavar='N', help='for sharpness (default: 512)')
    study.add_argument('--no-sharpness', action='store_true', help='do not measure the trained networks')
    study.add_argument('--keep-checkpoints', action='store_true', help='keep checkpoints of finished runs')
    study.set_defaults(command=_study)

    survive = commands.add_parser(
        'survive',
        help='train language models, and see what fine-tuning, quantisation and noise take from them',
        description=_survive.__doc__,
        allow_abbrev=False,
    )
    _add_runs(survive, 'survival')
    survive.add_argument(
        '--finetune', metavar='RECIPE', help='other text, with learning rates as its grid; file or name'
    )
    survive.add_argument('--grid', action='append', default=[], metavar='KEY=V,V', help='for the recipes with this key')
    survive.add_argument('--bits', type=_numbers(int), default=(8, 4), metavar='N,N', help='of weights (default: 8,4)')
    survive.add_argument('--group', type=positive, default=64, metavar='N', help='weights per scale (default: 64)')
    survive.add_argument(
        '--noise',
        type=_numbers(float),
        default=(0.05, 0.1, 0.2),
        metavar='X,X',
        help="in parts of each matrix's root mean square (default: 0.05,0.1,0.2)",
    )
    survive.add_argument('--draws', type=positive, default=3, metavar='N', help='of each noise (default: 3)')
    survive.add_argument('--samples', type=positive, default=512, metavar='N', help='test sequences (default: 512)')
    survive.set_defaults(command=_survive)


def _add_runs(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument(
        'changes',
        nargs='+',
        metavar='RECIPE|key=value',
        help='YAML files, or names that recipes lists (+ joins overlays); overrides apply to all',
    )
    _add_options(parser, out)


def _add_options(parser: argparse.ArgumentParser, out: str, seeds: int = 1) -> None:
    parser.add_argument('--seeds', type=positive, default=seeds, metavar='N', help=f'seeds per run (default: {seeds})')
    parser.add_argument('--jobs', type=positive, metavar='N', help='parallel runs (default: cores; 1 on a GPU)')
    parser.add_argument('--out', type=Path, default=Path(out), metavar='DIR', help=f'for results (default: {out})')


def _numbers(kind: type[int] | type[float]) -> Callable[[str], tuple[float, ...]]:
    """Return what reads numbers that are separated by commas."""

    def read(text: str) -> tuple[float, ...]:
        try:
            return tuple(kind(part) for part in text.split(',') if text)
        except ValueError:
            what = 'integers' if kind is int else 'numbers'
            raise argparse.ArgumentTypeError(f'must be {what} separated by commas, got {text!r}') from None

    return read


def _compare(options: argparse.Namespace) -> int:
    """Train several recipes, print a table of the results and draw the learning curves."""
    if (code := refuse_launcher('compare')) != OK:
        return code
    starting('compare')
    recipes, overrides = files_and_overrides(options.changes)
    return _compared(recipes, overrides, options, options.sharpness, options.landscape)


def _demo(options: argparse.Namespace) -> int:
    """Train SGD, SGD that is stopped early, and SAM on digits with wrong labels, and write tables and pictures.

    It is composer-sam compare digits/sgd digits/sgd_early digits/sam --seeds 3 --out demo --sharpness --landscape.
    """
    if (code := refuse_launcher('demo')) != OK:
        return code
    starting('demo')
    with extra('all', 'the demo'):
        files, overrides = files_and_overrides(options.changes)
        if files:
            complain(f'demo takes no recipes, got {" ".join(files)}; composer-sam compare compares recipes')
            return MISTAKE
        if not (found := shipped.recipes()):
            complain(shipped.MISSING)
            return MISTAKE
        # Their files: a file of the user's that has the same name is not meant here.
        return _compared([str(found[name]) for name in DEMO], overrides, options, sharpness=True, landscape=True)


def _compared(
    recipes: Sequence[str], overrides: Sequence[str], options: argparse.Namespace, sharpness: bool, landscape: bool
) -> int:
    from composer_sam.studies.compare import compare

    return _run(lambda: compare(recipes, overrides, options.seeds, options.out, options.jobs, sharpness, landscape))


def _study(options: argparse.Namespace) -> int:
    """Train recipes at every point of their grids with several seeds, measure the networks and write the tables.

    Finished runs in the output directory are not trained again; an interrupted run continues from its checkpoint.
    """
    if (code := refuse_launcher('study')) != OK:
        return code
    starting('study')
    from composer_sam.studies.plan import StudyOptions
    from composer_sam.studies.sharpness import Sharpness
    from composer_sam.studies.study import study

    recipes, overrides = files_and_overrides(options.changes)
    sharpness = None if options.no_sharpness else Sharpness(options.samples)
    wanted = StudyOptions(
        recipes, overrides, options.grid, options.seeds, options.out, sharpness, options.keep_checkpoints
    )
    return _run(lambda: study(wanted, options.jobs))


def _survive(options: argparse.Namespace) -> int:
    """Train language models, and measure what they lose to fine-tuning on other text, to quantisation and to noise.

    What is finished in the output directory is not done again; an interrupted training continues from its checkpoint.
    """
    if (code := refuse_launcher('survive')) != OK:
        return code
    starting('survive')
    from composer_sam.studies.survival.plan import SurvivalOptions, Trials
    from composer_sam.studies.survival.survive import survive

    recipes, overrides = files_and_overrides(options.changes)
    try:
        trials = Trials(options.bits, options.group, options.noise, options.draws, options.samples)
    except ValueError as error:
        complain(str(error))
        return MISTAKE
    wanted = SurvivalOptions(recipes, options.finetune, overrides, options.grid, options.seeds, options.out, trials)
    return _run(lambda: survive(wanted, options.jobs))


def _run(work: Callable[[], object]) -> int:
    """Do the work of a command, say what goes wrong, and return its exit code."""
    from composer_sam.recipes import RecipeError
    from composer_sam.studies.parallel import RunError

    try:
        work()
    except RecipeError as error:
        complain(str(error))
        return MISTAKE
    except BrokenPipeError:
        raise
    except (RunError, OSError) as error:
        complain(str(error))
        return FAILED
    return OK

"""The ``composer-sam`` command: the parser, the dispatch to a command, and the exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from composer_sam.commands import checkpoints, methods, studies, train
from composer_sam.commands.terminal import FAILED, INTERRUPTED, MISTAKE, complain

__all__ = ['main']


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments after the program's name; those of this process if None.

    Returns:
        0 for success, 1 if training failed, 2 for a mistake of the user or a package that is not installed, 130 for
        an interrupt.
    """
    parser = _parser()
    try:
        options, further = parser.parse_known_args(arguments)
        # argparse does not add positional arguments after an option to the list before it: A.yaml --seeds 3 key=value
        if any(argument.startswith('-') for argument in further) or (further and 'changes' not in options):
            parser.error(f'unrecognized arguments: {" ".join(further)}')
    except SystemExit as stop:  # argparse exits the process; a caller from Python needs the code instead
        return stop.code if isinstance(stop.code, int) else MISTAKE
    if further:
        options.changes += further
    try:
        return options.command(options)
    except ModuleNotFoundError as error:
        complain(str(error))
        return MISTAKE
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as stop:  # Composer turns SIGINT and SIGTERM into SystemExit
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
    for module in (train, studies, checkpoints, methods):
        module.add(commands)
    return parser

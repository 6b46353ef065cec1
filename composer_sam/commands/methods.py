"""The command ``methods``."""

from __future__ import annotations

import argparse

from composer_sam.commands.terminal import OK, Commands

__all__ = ['add']


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser('methods', help='list the methods', description=_methods.__doc__)
    parser.set_defaults(command=_methods)


def _methods(options: argparse.Namespace) -> int:
    """List the methods with the cost of a step, the hyper-parameters and the paper."""
    del options
    from composer_sam.methods import table

    # Lines are not wrapped at the terminal's width, so that the addresses of papers stay whole.
    line = '{:<14}{:<8}{:<14}{:<13}{}'
    print(line.format('name', 'passes', 'extra-memory', 'collectives', 'paper'))
    for row in table():
        memory = f'{row["extra_copies"]} x weights'
        print(line.format(row['name'], row['passes'], memory, row['collectives'], row['paper']))
        print('  ' + ', '.join(f'{name}={default!r}' for name, default in row['hyperparameters'].items()))
    return OK

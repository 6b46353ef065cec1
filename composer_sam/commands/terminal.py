"""What all commands share: exit codes, types of arguments, and messages to the user."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from composer_sam.files import make_writable
from composer_sam.shipped import expanded

__all__ = [
    'FAILED',
    'INTERRUPTED',
    'MISTAKE',
    'OK',
    'TOLD',
    'UNREAD',
    'Commands',
    'check_folder',
    'complain',
    'fail',
    'files_and_overrides',
    'interrupted',
    'is_first_process',
    'natural',
    'note',
    'positive',
    'refuse_launcher',
    'say',
    'starting',
]

OK, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
TOLD = 128 + signal.SIGTERM
UNREAD = 141  # nobody reads the output any more, as of a program that SIGPIPE ends

Commands: TypeAlias = 'argparse._SubParsersAction[argparse.ArgumentParser]'


def natural(text: str) -> int:
    """Return the integer >= 0 that an argument spells."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f'must be an integer >= 0, got {text!r}')
    return int(text)


def positive(text: str) -> int:
    """Return the integer >= 1 that an argument spells."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be an integer >= 1, got {text!r}')
    return int(text)


def files_and_overrides(changes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate files, and names of recipes, from ``dotted.key=value`` overrides."""
    from composer_sam.recipes import is_override

    files = [file for change in changes if not is_override(change) for file in expanded(change)]
    return files, [change for change in changes if is_override(change)]


def check_folder(folder: Path) -> None:
    """Create the folder for results and raise ValueError where it cannot be written."""
    try:
        make_writable(folder)
    except OSError as error:
        raise ValueError(f'--out: {str(folder)!r} cannot be written: {error.strerror}') from None


def refuse_launcher(command: str) -> int:
    """Return MISTAKE, with a message, where Composer's launcher has started several processes; else OK."""
    if int(os.environ.get('WORLD_SIZE', '1')) == 1:
        return OK
    complain(f'{command} starts its own processes; run it without the launcher')
    return MISTAKE


def fail(command: str, error: Exception) -> int:
    """Print the traceback of an unexpected error and return FAILED."""
    traceback.print_exception(error)
    complain(f'{command} failed: {type(error).__name__}: {error}')
    return FAILED


def interrupted(stop: BaseException, hint: str = '') -> int:
    """Print that the command was interrupted or told to stop, in one line, and return the exit code.

    Args:
        stop: what ended the command: KeyboardInterrupt, or SystemExit, into which Composer turns SIGINT and SIGTERM.
        hint: how to go on.

    Raises:
        BrokenPipeError: nobody reads the output any more, which Rich turns into SystemExit.
    """
    if isinstance(stop.__context__, BrokenPipeError):
        raise stop.__context__
    if is_first_process() and sys.stderr.isatty():
        print('\r', end='', file=sys.stderr)  # over the ^C that the terminal shows
    told = isinstance(stop, SystemExit) and stop.code == TOLD
    complain(f'{"told to stop (SIGTERM)" if told else "interrupted"}{hint}')
    if isinstance(stop, SystemExit):
        return stop.code if isinstance(stop.code, int) else FAILED
    return INTERRUPTED


def starting(what: str, in_logs: bool = False) -> None:
    """Print a line at once, before what takes seconds to import is imported; to a terminal only, unless ``in_logs``."""
    if in_logs or sys.stderr.isatty():
        note(f'starting {what} ...')


def say(message: str) -> None:
    """Print to stdout, on the first of several processes only."""
    if is_first_process():
        print(message)


def note(message: str) -> None:
    """Print a line to stderr that is no complaint, on the first of several processes only."""
    if is_first_process():
        print(message, file=sys.stderr, flush=True)


def complain(message: str) -> None:
    """Print one line to stderr, on the first of several processes only."""
    note(f'composer-sam: {" ".join(message.split())}')


def is_first_process() -> bool:
    """Return whether this is the first of the processes that Composer's launcher has started."""
    return int(os.environ.get('RANK', '0')) == 0

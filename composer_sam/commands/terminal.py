"""What all commands share: exit codes, numbers on the command line, and what they say to the user."""

from __future__ import annotations

import argparse
import os
import sys
import traceback

__all__ = [
    'FAILED',
    'INTERRUPTED',
    'MISTAKE',
    'OK',
    'complain',
    'fail',
    'natural',
    'positive',
    'refuse_launcher',
    'say',
]

OK, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130


def natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f'must be an integer >= 0, got {text!r}')
    return int(text)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be an integer >= 1, got {text!r}')
    return int(text)


def refuse_launcher(command: str) -> int:
    if int(os.environ.get('WORLD_SIZE', '1')) == 1:
        return OK
    complain(f'{command} starts its own processes; run it without the launcher')
    return MISTAKE


def fail(command: str, error: Exception) -> int:
    traceback.print_exception(error)
    complain(f'{command} failed: {type(error).__name__}: {error}')
    return FAILED


def _is_first_process() -> bool:
    return int(os.environ.get('RANK', '0')) == 0


def say(message: str) -> None:
    if _is_first_process():
        print(message)


def complain(message: str) -> None:
    if _is_first_process():
        print(f'composer-sam: {" ".join(message.split())}', file=sys.stderr)

"""Tasks in processes of their own, several at a time."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

__all__ = ['ProcessDied', 'Raised', 'Returned', 'Sent', 'run_tasks']

_GRACE_SECONDS = 10  # for a process that is told to end to close its files

Message = TypeVar('Message')
Result = TypeVar('Result')


class ProcessDied(RuntimeError):
    """A process ended without a result: it was killed, or it crashed."""


@dataclass(frozen=True)
class Sent(Generic[Message]):
    """A message that a task sent while it runs."""

    message: Message


@dataclass(frozen=True)
class Returned(Generic[Result]):
    """The result a task ended with."""

    result: Result


@dataclass(frozen=True)
class Raised:
    """The exception a task ended with, :class:`ProcessDied` if its process ended without a result."""

    error: Exception


def run_tasks(
    tasks: Sequence[Callable[[Callable[[Message], None]], Result]], jobs: int, preload: str
) -> Generator[tuple[int, Sent[Message] | Returned[Result] | Raised], None, None]:
    """Run every task in a process of its own, and yield what the tasks send and how each of them ends.

    The processes ignore an interrupt and end with this process. When the generator is closed, by an exception too, the
    processes that still run are terminated, and killed if they do not end within seconds. Use it with
    :func:`contextlib.closing`.

    Args:
        tasks: called with a function that sends a message to this process. Tasks, messages and results are pickled.
        jobs: how many processes run at a time.
        preload: the module that is imported once, in the server process from which the others are forked.

    Yields:
        The index of a task, and one message or its end. Every task has exactly one end, its last event.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([preload])
    _start_server()
    waiting = list(reversed(range(len(tasks))))
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index = waiting.pop()
                # Pickled here: multiprocessing would move tensors into shared memory, those of the caller too.
                task = pickle.dumps(tasks[index])
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(task, sender))
                process.start()
                sender.close()
                running[receiver] = index, process
            ready = multiprocessing.connection.wait(list(running))
            for receiver in [one for one in running if one in ready]:
                index, process = running[receiver]
                event: Sent[Message] | Returned[Result] | Raised = _receive(receiver)
                if not isinstance(event, Sent):
                    del running[receiver]
                    process.join()
                yield index, event
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join(_GRACE_SECONDS)
            process.kill()


def _start_server() -> None:
    """Start the server process such that it ignores an interrupt: this process hears it and ends the others."""
    if threading.current_thread() is not threading.main_thread():
        return  # Python sets signal handlers in the main thread only, and interrupts it only
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _receive(receiver: Connection) -> Any:
    try:
        return pickle.loads(receiver.recv_bytes())
    except (EOFError, OSError):
        return Raised(ProcessDied('a process ended without a result: it was killed, perhaps for lack of memory'))


def _work(task: bytes, sender: Connection) -> None:
    """Run one task; runs in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what the server imports can have set another handler
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(event: object) -> None:
        sender.send_bytes(pickle.dumps(event))

    try:
        send(Returned(pickle.loads(task)(lambda message: send(Sent(message)))))
    except Exception as error:
        send(Raised(_picklable(error)))


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f'{type(error).__name__}: {error}')
    return error


def _end_with_parent() -> None:
    """End this process when the one that started it ends, which can be started again on the same files."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

"""SIGTERM, by which clusters announce that they take a machine back: all processes save the run and leave it."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.data import DataLoader

__all__ = ['SECONDS', 'Preemption']

SECONDS = 14  # from SIGTERM to the end of a process whose batch does not end; composer-sam train --help names it
_EXIT_CODE = 128 + signal.SIGTERM


class Preemption(Callback):
    """A callback that ends training after the batch in which SIGTERM came to any process, with a checkpoint.

    After every batch all processes agree whether one of them was told to stop. If so, every CheckpointSaver saves this
    step, whatever its interval, and all processes leave before the next batch, by SystemExit with exit code 143. Where
    no batch comes to its end (it takes long, an evaluation runs, another process is dead and this one waits for it in
    a collective), the process says so and ends after some seconds, wherever it is. Before training and after it,
    SIGTERM raises SystemExit at once. A second SIGTERM changes nothing: where a cluster sends one to every process,
    Composer's launcher sends another.

    Use it as a callback of a Trainer that is built and trained within :meth:`listening`.

    Args:
        seconds: the time from SIGTERM to the end of a process whose batch does not end.

    Attributes:
        saved: whether training was left with a checkpoint of its last step; None if it was not left.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.saved: bool | None = None
        self._seconds = seconds
        self._told = False  # this process
        self._leaves = False  # all processes
        self._trains = False  # the end of a batch is to come
        self._savers: list[CheckpointSaver] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to SIGTERM in this context; afterwards the handler is the one it was before."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python hears signals in the main thread only
            return
        # Python calls a handler when the main thread comes back from C++, which one that waits in a collective never
        # does. Python's own handler, in C, writes the number of the signal to this socket at once.
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(receiver, ended), daemon=True)
        watch.start()
        handler = signal.signal(signal.SIGTERM, self._hear) or signal.SIG_DFL
        descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)

        def restore() -> None:
            signal.set_wakeup_fd(descriptor)
            signal.signal(signal.SIGTERM, handler)

        def restore_in_child() -> None:
            if not ended.is_set():  # a process that is forked in this context is told for itself, not for this one
                restore()

        os.register_at_fork(after_in_child=restore_in_child)
        try:
            yield
        finally:
            restore()
            if self._told:  # the launcher tells a process again that takes longer to end than the others
                atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
            ended.set()
            sender.close()
            watch.join()
            receiver.close()

    def fit_start(self, state: State, logger: Logger) -> None:
        del logger
        self._trains = True
        self._savers = [one for one in state.callbacks if isinstance(one, CheckpointSaver) and not one.weights_only]
        for saver in self._savers:
            saver.save_interval = self._or_leaving(saver.save_interval)
        for loader in (state.train_dataloader, *(one.dataloader.dataloader for one in state.evaluators)):
            if isinstance(loader, DataLoader) and sys.platform == 'linux':
                loader.worker_init_fn = loader.worker_init_fn or _outlast

    def batch_end(self, state: State, logger: Logger) -> None:
        del logger
        self._leaves = self._told
        if dist.get_world_size() > 1:
            told = state.device.tensor_to_device(torch.tensor([self._told], dtype=torch.uint8))
            dist.all_reduce(told, reduce_operation='MAX')
            self._leaves = bool(told.item())
        if self._leaves and not self._told:
            signal.raise_signal(signal.SIGTERM)  # the time of this process runs, too

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """The first event after the checkpoint of a batch, unless training is at its end."""
        del logger
        if self._leaves:
            self.saved = any(saver.last_checkpoint_batch == state.timestamp.batch for saver in self._savers)
            raise SystemExit(_EXIT_CODE)

    def fit_end(self, state: State, logger: Logger) -> None:
        del state, logger
        self._trains = False

    def _or_leaving(self, interval: Callable[[State, Event], bool]) -> Callable[[State, Event], bool]:
        return lambda state, event: interval(state, event) or self._leaves

    def _hear(self, number: int, frame: object) -> None:
        del number, frame
        already, self._told = self._told, True
        if not already and not self._trains:
            raise SystemExit(_EXIT_CODE)

    def _watch(self, receiver: socket.socket, ended: threading.Event) -> None:
        """End the process if the run has not ended some seconds after SIGTERM; runs in a thread of its own."""
        while signal.SIGTERM not in (heard := receiver.recv(1024)):
            if not heard:
                return
        if not ended.wait(self._seconds):
            below = '\n\x1b[?25h' if os.isatty(2) else ''  # the progress bar, which hides the cursor
            os.write(2, (below + self._last_words()).encode())
            os._exit(_EXIT_CODE)

    def _last_words(self) -> str:
        who = f'process {dist.get_global_rank()} ends' if dist.get_world_size() > 1 else 'it ends'
        kept = '; autoresume=true goes on from the newest checkpoint' if self._savers else ''
        return (
            f'composer-sam: told to stop (SIGTERM), but the batch, evaluation or checkpoint under way has not ended '
            f'in {self._seconds:g} seconds: {who} without a checkpoint of this step{kept}\n'
        )


def _outlast(worker: int) -> None:
    """Let a worker of a loader end when its own process ends it, and not when a cluster tells every process to stop.

    Otherwise the last batch could not be loaded, and torch raises an error in the middle of a step.
    """
    del worker
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told_by_parent, daemon=True).start()


def _end_when_told_by_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

"""Evaluates a loss on a grid of weights: row by row, over processes, and on from where a killed run stopped."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from composer_sam.diagnostics.objective import Loss, Objective
from composer_sam.diagnostics.samples import on
from composer_sam.landscapes.storage import Landscape, LandscapeError, Rows
from composer_sam.landscapes.subspaces import Subspace

__all__ = ['evaluate', 'measuring', 'one_thread']

Measure = Callable[[dict[str, Tensor]], tuple[float, float]]  # from weights by name to loss and accuracy

_PROCESSES_FROM = 20.0  # seconds left from which further processes, which take a few to start, pay


def evaluate(
    subspace: Subspace,
    model: nn.Module,
    loss: Loss | None,
    batches: Sequence[Any],
    coordinates: Sequence[np.ndarray],
    *,
    label: str = '',
    about: dict[str, Any] | None = None,
    path: Path | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
    recalibrate: bool = False,
) -> Landscape:
    """Evaluates the mean loss, and the accuracy of a classifier, at every point of a grid.

    Every point is computed on one thread, so the result does not depend on the number of processes, bit for bit. The
    model is left as it was, bit for bit.

    Args:
        subspace: Turns coordinates into weights.
        model: As for :class:`composer_sam.diagnostics.objective.Objective`, like ``loss`` and ``batches``. To be sent
            to other processes all three must be picklable.
        loss: None for a Composer model.
        batches: All samples of them are used.
        coordinates: One ascending array per axis. To those of a line the marks' are added.
        label: What the landscape is called.
        about: What is kept with it. A stored landscape is gone on with only if this is the same.
        path: Where to store every row as it is finished, and to go on from; nothing is stored without it.
        jobs: Processes; by default one, or one per core once one alone turns out to need long.
        progress: Called with the number of finished rows and that of all.
        recalibrate: Whether BatchNorm's running statistics are at every point those of the samples there, instead of
            what the subspace says; costs a second forward.

    Raises:
        LandscapeError: If there is no grid, or ``path`` holds another landscape.
        RuntimeError: If a process ended without a result.
    """
    if len(coordinates) != len(subspace.axes) or any(axis.size == 0 for axis in coordinates):
        sizes = ' x '.join(str(axis.size) for axis in coordinates)
        raise LandscapeError(f'a grid of {sizes} points cannot be laid over {len(subspace.axes)} axes')
    if len(coordinates) == 1:
        coordinates = [np.union1d(coordinates[0], [mark.at[0] for mark in subspace.marks])]
    about = {**(about or {}), 'fingerprint': _fingerprint(subspace, coordinates, batches)}
    rows = Rows.empty(Landscape(label, subspace.axes, tuple(coordinates), np.empty(0), None, subspace.marks, about))
    if path is not None and path.exists():
        rows.take(Rows.load(path), path)
    task = _Task(subspace, model, loss, batches, tuple(coordinates), recalibrate)
    progress(int(rows.done.sum()), len(rows.done))
    with one_thread():
        with task.measuring() as measure:
            rows.mark([measure(subspace.weights(mark.at)) for mark in subspace.marks])
        with closing(_finished(task, np.flatnonzero(~rows.done).tolist(), jobs)) as finished:
            for index, values in finished:
                rows.put(index, values)
                if path is not None:
                    rows.save(path)
                progress(int(rows.done.sum()), len(rows.done))
    if path is not None:
        rows.save(path)  # where nothing was left to do the label may be new
    return rows.landscape


@dataclass(frozen=True)
class _Task:
    """All a process needs to evaluate a row."""

    subspace: Subspace
    model: nn.Module
    loss: Loss | None
    batches: Sequence[Any]
    coordinates: tuple[np.ndarray, ...]
    recalibrate: bool

    def measuring(self) -> AbstractContextManager[Measure]:
        return measuring(self.model, self.loss, self.batches, self.recalibrate)

    def row(self, index: int, measure: Measure) -> np.ndarray:
        """Losses and accuracies of a row of a plane, or of a point of a line."""
        if len(self.coordinates) == 1:
            points = [(float(self.coordinates[0][index]),)]
        else:
            points = [(float(x), float(self.coordinates[1][index])) for x in self.coordinates[0]]
        return np.array([measure(self.subspace.weights(point)) for point in points]).T


@contextmanager
def measuring(
    model: nn.Module, loss: Loss | None, batches: Sequence[Any], recalibrate: bool = False
) -> Iterator[Measure]:
    """Inside, a function from weights by name, those that change, to loss and accuracy (not a number if unknown).

    At the end the model is as it was before, bit for bit. The arguments are those of :func:`evaluate`.
    """
    hits = _Hits()
    counted = None if loss is None else hits.counting(loss)
    objective = Objective(model, counted, batches)
    hook = model.register_forward_hook(hits.hook) if loss is None else None
    places = dict([*model.named_parameters(), *model.named_buffers()])

    def measure(weights: dict[str, Tensor]) -> tuple[float, float]:
        for name, value in weights.items():
            if isinstance(places[name], nn.Parameter):
                places[name].data = value  # points at it; nothing is copied
            else:
                places[name].copy_(value)
        if recalibrate:
            _gather_statistics(model, [batch if loss is None else batch[0] for batch in batches], objective.device)
        hits.restart()
        return objective.value(), hits.fraction

    try:
        with objective.undisturbed(), torch.no_grad():
            yield measure
    finally:
        if hook is not None:
            hook.remove()


def _gather_statistics(model: nn.Module, inputs: Sequence[Any], device: torch.device) -> None:
    """Makes BatchNorm's running statistics the mean of those of the batches."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a mean over all batches, each with the same weight
            norm.train()
        for batch in inputs if norms else ():
            model(on(batch, device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


class _Hits:
    """Counts the samples whose largest output is that of their class, where outputs and targets are of that kind."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.right, self.total = 0, 0

    @property
    def fraction(self) -> float:
        return self.right / self.total if self.total else math.nan

    def counting(self, loss: Loss) -> Loss:
        def counted(outputs: Any, targets: Any) -> Tensor:
            self.note(outputs, targets)
            return loss(outputs, targets)

        return counted

    def hook(self, module: nn.Module, arguments: tuple[Any, ...], outputs: Any) -> None:
        del module
        batch = arguments[0]  # a Composer model is called with the whole batch
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            self.note(outputs, batch[1])

    def note(self, outputs: Any, targets: Any) -> None:
        if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.ndim == 2):
            return
        if targets.shape == outputs.shape[:1] and not targets.is_floating_point():
            self.right += int((outputs.argmax(dim=1) == targets).sum())
            self.total += len(targets)


def _finished(task: _Task, rows: list[int], jobs: int | None) -> Generator[tuple[int, np.ndarray]]:
    """The rows as they are finished, by this process or by several others."""
    may_spread = jobs is None and _cores() > 1 and all(tensor.is_cpu for tensor in task.subspace.tensors())
    if jobs is None or min(jobs, len(rows)) <= 1:
        start = time.perf_counter()
        with task.measuring() as measure:
            for done, index in enumerate(rows):
                seconds_left = (time.perf_counter() - start) / max(done, 1) * (len(rows) - done)
                if may_spread and done and seconds_left > _PROCESSES_FROM:
                    break
                yield index, task.row(index, measure)
            else:
                return
        rows, jobs = rows[done:], _cores()
    yield from _by_processes(task, rows, min(jobs, len(rows)))


def _by_processes(task: _Task, rows: list[int], jobs: int) -> Iterator[tuple[int, np.ndarray]]:
    # As bytes: as they are, tensors would be moved into shared memory, those of the caller's model too.
    content = pickle.dumps(task)
    context = multiprocessing.get_context('spawn')
    waiting = list(reversed(rows))
    running: dict[Any, BaseProcess] = {}
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            running[ours] = process
            ours.send(waiting.pop())
            ours.send_bytes(content)
        for _ in rows:
            connection: Any = multiprocessing.connection.wait(list(running))[0]
            answer = _received(connection)
            if waiting:
                connection.send(waiting.pop())
            else:
                connection.close()  # the process ends when it reads nothing more
                running.pop(connection).join()
            yield answer
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _received(connection: Any) -> tuple[int, np.ndarray]:
    try:
        answer = connection.recv()
    except EOFError:
        raise RuntimeError('a process ended without a result: it was killed, perhaps for want of memory') from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _work(connection: Connection) -> None:
    """Evaluates rows, by their number, until no more come; runs in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears an interrupt and ends the others
    torch.set_num_threads(1)
    try:
        index = connection.recv()
        task: _Task = pickle.loads(connection.recv_bytes())
        with task.measuring() as measure:
            while True:
                connection.send((index, task.row(index, measure)))
                index = connection.recv()
    except (EOFError, ConnectionError):  # the first process needs nothing more, or is gone
        return
    except Exception as error:
        connection.send(error)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of computation inside: sums are then in the same order, and of the same bits, everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fingerprint(subspace: Subspace, coordinates: Sequence[np.ndarray], batches: Sequence[Any]) -> str:
    """What all losses of a grid follow from, the network's code aside."""
    digest = hashlib.sha256()
    samples = [item for batch in batches for item in _tensors(batch)]
    for tensor in (*subspace.tensors(), *samples):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for axis in coordinates:
        digest.update(axis.tobytes())
    return digest.hexdigest()


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from _tensors(list(batch.values()))
    elif isinstance(batch, (tuple, list)):
        for item in batch:
            yield from _tensors(item)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1

"""The loss on a grid of weights: evaluated row by row, in several processes, and resumed after a kill."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
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
from composer_sam.processes import Raised, Sent, run_tasks

__all__ = ['evaluate', 'measuring', 'one_thread']

Measure = Callable[[dict[str, Tensor]], tuple[float, float]]  # from weights by name to loss and accuracy
Row = tuple[int, np.ndarray]  # the index of a row, and its losses and accuracies

_PROCESSES_FROM = 20.0  # expected seconds from which starting further processes, a few seconds' work, is worth it


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
    """Evaluate the mean loss, and the accuracy of a classifier, at every point of a grid.

    Every point is computed on one thread, so that the result is the same, bit for bit, for any number of processes.
    The model is left as it was, bit for bit.

    Args:
        subspace: turns coordinates into weights.
        model: as for :class:`composer_sam.diagnostics.objective.Objective`, like ``loss`` and ``batches``. With several
            processes all three must be picklable.
        loss: None for a Composer model.
        batches: the samples; all of them are used.
        coordinates: one ascending array per axis. The coordinates of the marks are added to those of a line.
        label: the name of the landscape.
        about: stored with the landscape. A stored landscape is resumed only if it is equal.
        path: every finished row is stored in this file, and a file that exists is resumed; nothing is stored if None.
        jobs: the number of processes. If None, one, and one per core when the first rows show that one takes long.
        progress: called with the number of finished rows and the number of all rows.
        recalibrate: compute BatchNorm's running statistics from the samples at every point, instead of taking them
            from the subspace; costs a second forward.

    Raises:
        LandscapeError: there is no grid, or ``path`` holds another landscape.
        RuntimeError: a process ended without a result.
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
        rows.save(path)  # where every row was stored already the label can be new
    return rows.landscape


@dataclass(frozen=True)
class _Task:
    """Everything a process needs to evaluate a row."""

    subspace: Subspace
    model: nn.Module
    loss: Loss | None
    batches: Sequence[Any]
    coordinates: tuple[np.ndarray, ...]
    recalibrate: bool

    def measuring(self) -> AbstractContextManager[Measure]:
        return measuring(self.model, self.loss, self.batches, self.recalibrate)

    def row(self, index: int, measure: Measure) -> np.ndarray:
        """Return the losses and accuracies of a row of a plane, or of a point of a line."""
        if len(self.coordinates) == 1:
            points = [(float(self.coordinates[0][index]),)]
        else:
            points = [(float(x), float(self.coordinates[1][index])) for x in self.coordinates[0]]
        return np.array([measure(self.subspace.weights(point)) for point in points]).T


@contextmanager
def measuring(
    model: nn.Module, loss: Loss | None, batches: Sequence[Any], recalibrate: bool = False
) -> Iterator[Measure]:
    """Give a function from weights by name to loss and accuracy; at the end restore the model, bit for bit.

    Weights that are left out keep the values they have. An accuracy that is not known is not a number. The arguments
    are those of :func:`evaluate`.
    """
    accuracy = _Accuracy()
    counted = None if loss is None else accuracy.counting(loss)
    objective = Objective(model, counted, batches)
    hook = model.register_forward_hook(accuracy.hook) if loss is None else None
    places = dict([*model.named_parameters(), *model.named_buffers()])

    def measure(weights: dict[str, Tensor]) -> tuple[float, float]:
        for name, value in weights.items():
            if isinstance(places[name], nn.Parameter):
                places[name].data = value  # a reference, not a copy
            else:
                places[name].copy_(value)
        if recalibrate:
            _gather_statistics(model, [batch if loss is None else batch[0] for batch in batches], objective.device)
        accuracy.restart()
        return objective.value(), accuracy.fraction

    try:
        with objective.undisturbed(), torch.no_grad():
            yield measure
    finally:
        if hook is not None:
            hook.remove()


def _gather_statistics(model: nn.Module, inputs: Sequence[Any], device: torch.device) -> None:
    """Set BatchNorm's running statistics to the mean of the statistics of the batches."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches, with equal weights
            norm.train()
        for batch in inputs if norms else ():
            model(on(batch, device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


class _Accuracy:
    """Counts the samples whose largest output is that of their class.

    Only two-dimensional outputs with one class per sample as their target are counted.
    """

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


def _finished(task: _Task, rows: list[int], jobs: int | None) -> Generator[Row]:
    """Yield the rows as they are finished, by this process or by several others."""
    spreads = jobs is None and _cores() > 1 and all(tensor.is_cpu for tensor in task.subspace.tensors())
    if jobs is None or min(jobs, len(rows)) <= 1:
        done, start = 0, time.perf_counter()
        with task.measuring() as measure:
            while done < len(rows) and not (spreads and _takes_long(start, done, len(rows))):
                yield rows[done], task.row(rows[done], measure)
                done += 1
        rows, jobs = rows[done:], _cores()
    if rows:
        yield from _by_processes(task, rows, min(jobs, len(rows)))


def _takes_long(start: float, done: int, of: int) -> bool:
    """Whether the rows that are left are expected to take so long that further processes are worth it."""
    return done > 0 and (time.perf_counter() - start) / done * (of - done) > _PROCESSES_FROM


def _by_processes(task: _Task, rows: list[int], jobs: int) -> Iterator[Row]:
    """Yield the rows as they are finished by ``jobs`` processes; each evaluates every ``jobs``-th of them."""
    shares = [functools.partial(_send_rows, task, rows[start::jobs]) for start in range(jobs)]
    with closing(run_tasks(shares, jobs, preload=__name__)) as events:
        for _, event in events:
            if isinstance(event, Raised):
                raise event.error
            if isinstance(event, Sent):
                yield event.message


def _send_rows(task: _Task, rows: list[int], send: Callable[[Row], None]) -> None:
    """Evaluate rows and send each when it is finished; runs in a process of its own."""
    torch.set_num_threads(1)
    with task.measuring() as measure:
        for index in rows:
            send((index, task.row(index, measure)))


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: sums are then taken in the same order, with the same bits, everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fingerprint(subspace: Subspace, coordinates: Sequence[np.ndarray], batches: Sequence[Any]) -> str:
    """Return a hash of everything the losses of a grid depend on, but for the code of the network."""
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

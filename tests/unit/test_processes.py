"""Tasks in processes of their own: messages, results, exceptions, deaths, and an end that leaves no process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch

from composer_sam.processes import ProcessDied, Raised, Returned, Sent, run_tasks

PRELOAD = 'torch'
Send = Callable[[int], None]


class Peculiar(Exception):
    """An exception that cannot be unpickled: it needs two arguments and passes on one."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def squares(upto: int, send: Send) -> str:
    for number in range(upto):
        send(number**2)
    return f'done {upto}'


def fail(error: Exception, send: Send) -> str:
    raise error


def fail_peculiarly(send: Send) -> str:
    raise Peculiar('first ', 'second')


def leave(send: Send) -> str:
    send(1)
    os._exit(3)


def wait(folder: Path, send: Send) -> str:
    (folder / str(os.getpid())).touch()
    send(0)
    time.sleep(600)
    return ''


def total(weights: torch.Tensor, send: Send) -> float:
    return float(weights.sum())


@pytest.mark.parametrize('jobs', [1, 2, 5])
def test_every_task_sends_its_messages_in_order_and_then_its_result(jobs: int) -> None:
    tasks = [partial(squares, upto) for upto in (3, 0, 2)]
    seen: dict[int, list[object]] = {0: [], 1: [], 2: []}
    for index, event in run_tasks(tasks, jobs, PRELOAD):
        seen[index].append(event)
    for index, upto in enumerate((3, 0, 2)):
        assert seen[index] == [*(Sent(number**2) for number in range(upto)), Returned(f'done {upto}')]


def test_an_exception_and_a_death_end_their_own_task_only() -> None:
    tasks = [partial(fail, ValueError('injected')), leave, partial(squares, 1), fail_peculiarly]
    ends = {index: event for index, event in run_tasks(tasks, 2, PRELOAD) if not isinstance(event, Sent)}
    raised = {index: event.error for index, event in ends.items() if isinstance(event, Raised)}
    assert isinstance(raised[0], ValueError) and str(raised[0]) == 'injected'
    assert isinstance(raised[1], ProcessDied)
    assert ends[2] == Returned('done 1')
    assert type(raised[3]) is RuntimeError and str(raised[3]) == 'Peculiar: first second'


def test_tensors_of_the_caller_are_not_moved_into_shared_memory() -> None:
    weights = torch.ones(3)
    assert list(run_tasks([partial(total, weights)], 1, PRELOAD)) == [(0, Returned(3.0))]
    assert not weights.is_shared()


def test_closing_ends_the_processes(tmp_path: Path) -> None:
    with closing(run_tasks([partial(wait, tmp_path)] * 3, 2, PRELOAD)) as events:
        started = [next(events), next(events)]
    assert sorted(started, key=lambda event: event[0]) == [(0, Sent(0)), (1, Sent(0))]
    processes = [int(file.name) for file in tmp_path.iterdir()]
    assert len(processes) == 2
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)

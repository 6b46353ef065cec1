"""A step is before or after, never between: an interrupt at any bytecode, and an error in any tensor operation."""

from __future__ import annotations

import copy
import functools
import itertools
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from composer_sam import SharpnessAwareOptimizer
from composer_sam.engine.interrupts import InterruptsHeld
from composer_sam.engine.placement import Placement
from tests.conformance.faults import FailingOperations, Interrupted
from tests.conformance.parts import METHODS
from tests.problems import (
    BASES,
    REPRESENTATIVE,
    TWO_CALLS,
    Closure,
    batches,
    needs_graph,
    network,
    same,
    snapshot,
    with_all_passes,
)

FIRST, SECOND, THIRD = batches(3)
Step = Callable[[nn.Module, SharpnessAwareOptimizer, Any], None]
SHORT = 40  # places per case in the short form


def fresh(name: str, dropout: float = 0.5, **options: Any) -> tuple[nn.Sequential, SharpnessAwareOptimizer]:
    """A network and its optimizer after one step, so that state and memory are there."""
    torch.manual_seed(3)
    model = network(dropout=dropout)
    optimizer = SharpnessAwareOptimizer(BASES['AdamW'](model.parameters()), with_all_passes(name, **options), model)
    torch.manual_seed(4)
    if name in TWO_CALLS:
        two_calls(model, optimizer, FIRST)
    else:
        optimizer.step(Closure(model, FIRST, graph=needs_graph(name)))
    return model, optimizer


def by_closure(model: nn.Module, optimizer: SharpnessAwareOptimizer, batch: Any) -> None:
    optimizer.step(Closure(model, batch, graph=optimizer.method.backwards_create_graph))


def by_loop(model: nn.Module, optimizer: SharpnessAwareOptimizer, batch: Any) -> None:
    closure = Closure(model, batch, graph=optimizer.method.backwards_create_graph)
    for _ in optimizer.passes():
        closure()


def two_calls(model: nn.Module, optimizer: SharpnessAwareOptimizer, batch: Any) -> None:
    closure = Closure(model, batch, graph=optimizer.method.backwards_create_graph)
    closure()
    optimizer.first_step()
    closure()
    optimizer.second_step()


CASES = [
    *(
        pytest.param(
            name,
            by_closure,
            {},
            id=f'{name}-closure',
            marks=[] if name in (*REPRESENTATIVE, 'WSAM') else pytest.mark.slow,
        )
        for name in METHODS
    ),
    *(pytest.param(name, by_loop, {}, id=f'{name}-loop') for name in ('SAM', 'WSAM', 'GAM')),
    pytest.param('WSAM', by_closure, {'on_nonfinite': 'skip'}, id='WSAM-checked'),
]


def stepped(name: str, step: Step, options: Any, *batches: Any) -> tuple[nn.Module, SharpnessAwareOptimizer]:
    model, optimizer = fresh(name, **options)
    for batch in batches:
        step(model, optimizer, batch)
    return model, optimizer


def bytecodes(name: str, step: Step, options: Any) -> int:
    """How many bytecodes a step takes."""
    model, optimizer = fresh(name, **options)
    counting = Interrupted()
    counting(lambda: step(model, optimizer, SECOND))
    return counting.count


def places(count: int, every: int) -> list[int]:
    """Every so many bytecodes, and all of the last ones."""
    return sorted({*range(1, count, every), *range(max(1, count - 20), count)})


def weights_and_state(model: nn.Module, optimizer: SharpnessAwareOptimizer) -> dict[str, Any]:
    return {'weights': copy.deepcopy(list(model.parameters())), 'state': copy.deepcopy(optimizer.state_dict())}


def interrupted_everywhere(
    name: str, step: Step, options: Any, every: int, kept: Callable[..., dict[str, Any]] = snapshot
) -> None:
    """Interrupt a step at many places, each time a fresh one, and go on after it.

    Args:
        kept: what must be as before the step, or as after it.
    """
    before, after, further = (
        kept(*stepped(name, step, options, *batches)) for batches in ((), (SECOND,), (SECOND, THIRD))
    )
    count = bytecodes(name, step, options)
    ends: set[bool] = set()
    for place in places(count, every):
        model, optimizer = fresh(name, **options)
        interrupting = Interrupted(place)
        with pytest.raises(KeyboardInterrupt):
            interrupting(lambda model=model, optimizer=optimizer: step(model, optimizer, SECOND))
        optimizer.abandon_step()  # does nothing but between the two calls of the classic interface
        where = f'bytecode {place} of {count}, at {interrupting.where}'
        taken = optimizer.steps_taken == 2
        ends.add(taken)
        assert same(kept(model, optimizer), after if taken else before), where
        assert torch.is_grad_enabled() or kept is not snapshot, where
        torch.set_grad_enabled(True)  # torch.no_grad in the user's own code can leave it off
        for batch in (THIRD,) if taken else (SECOND, THIRD):
            step(model, optimizer, batch)
        assert same(kept(model, optimizer), further), where
    assert ends == {False, True}


@pytest.mark.parametrize(('name', 'step', 'options'), CASES)
def test_an_interrupt_leaves_the_step_before_or_after(name: str, step: Step, options: Any) -> None:
    interrupted_everywhere(name, step, options, every=bytecodes(name, step, options) // SHORT)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['SAM', 'WSAM', 'GAM'])
def test_an_interrupt_at_every_bytecode(name: str) -> None:
    interrupted_everywhere(name, by_closure, {}, every=1)


@pytest.mark.parametrize(
    ('step', 'options'),
    [
        pytest.param(two_calls, {}, id='two-calls'),
        pytest.param(two_calls, {'interval': 2}, id='two-calls-of-a-plain-step'),
        pytest.param(by_closure, {'interval': 2}, id='plain-step'),
    ],
)
def test_an_interrupt_of_two_calls_or_a_plain_step_leaves_weights_and_state_before_or_after(
    step: Step, options: Any
) -> None:
    """The forward before ``first_step``, and a step of the base optimizer, are the user's: they draw random numbers."""
    kept = weights_and_state
    interrupted_everywhere('SAM', step, {**options, 'dropout': 0.0}, bytecodes('SAM', step, options) // SHORT, kept)


@pytest.mark.parametrize('name', METHODS)
def test_an_operation_that_fails_leaves_the_step_before_it(name: str) -> None:
    """Out of memory in any tensor operation up to the base optimizer's step."""
    before, further = snapshot(*fresh(name)), snapshot(*stepped(name, by_closure, {}, SECOND, THIRD))
    failed = 0
    for place in itertools.count(1, step=5):
        model, optimizer = fresh(name)
        operations = FailingOperations(place)
        optimizer.base_optimizer.register_step_pre_hook(lambda *_, one=operations: one.stop())
        try:
            with operations:
                by_closure(model, optimizer, SECOND)
        except MemoryError as error:
            failed += 1
            assert same(snapshot(model, optimizer), before), str(error)
            assert all(p.grad is None for p in model.parameters()), str(error)
            for batch in (SECOND, THIRD):
                by_closure(model, optimizer, batch)
            assert same(snapshot(model, optimizer), further), str(error)
        else:
            break
    assert failed > 10


def test_interrupts_are_held_by_the_outermost_context_and_the_second_is_not() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done: list[str] = []
        with pytest.raises(KeyboardInterrupt), InterruptsHeld():
            with InterruptsHeld():
                signal.raise_signal(signal.SIGINT)
                done.append('inner')
            done.append('outer')
        assert done == ['inner', 'outer']
        with pytest.raises(KeyboardInterrupt), InterruptsHeld():
            signal.raise_signal(signal.SIGINT)
            done.append('first')
            signal.raise_signal(signal.SIGINT)
            done.append('never')
        assert done[2:] == ['first']
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_handler_of_another_signal_waits_too() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with InterruptsHeld():
            signal.raise_signal(signal.SIGTERM)
            assert seen == []
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_nothing_is_held_and_a_step_is_taken() -> None:
    model, optimizer = fresh('SAM')
    with ThreadPoolExecutor(1) as threads:
        threads.submit(by_closure, model, optimizer, SECOND).result()
    assert optimizer.steps_taken == 2


def interrupted_at(line: int, code: Any, step: Callable[[], None]) -> bool:
    """Interrupt the step at a line of the function with this code; return whether it came there."""
    lines = itertools.count(1)

    def inside(frame: Any, event: str, argument: Any) -> Any:
        if event == 'line' and next(lines) == line:
            raise KeyboardInterrupt
        return inside

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: inside if frame.f_code is code else None)
    try:
        step()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_while_the_layout_is_looked_at_leaves_a_step_that_can_be_taken() -> None:
    """What is worked out once for many steps must not be kept by half."""
    for line in itertools.count(1):
        model, expected_model = network(), network()
        optimizer, expected = (
            SharpnessAwareOptimizer(BASES['AdamW'](one.parameters()), with_all_passes('SAM'), one)
            for one in (model, expected_model)
        )
        step = functools.partial(by_closure, model, optimizer, SECOND)
        if not interrupted_at(line, Placement._exchanges.__code__, step):
            assert line > 5
            return
        for one, wrapped in ((model, optimizer), (expected_model, expected)):
            torch.manual_seed(5)
            by_closure(one, wrapped, SECOND)
        assert same(model.state_dict(), expected_model.state_dict())

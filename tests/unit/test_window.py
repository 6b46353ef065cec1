"""Time strings, and the time a loop of one's own tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from composer_sam import SAM, SharpnessAwareOptimizer
from composer_sam.engine.moment import Count, Moment, Timestamp
from composer_sam.methods.window import Time, Window
from tests.problems import Closure, batches, network

UNITS = ['iter', 'ep', 'ba', 'sp', 'tok', 'dur']


@st.composite
def _time_strings(draw: st.DrawFn) -> str:
    """A number and a unit, written as people may write them."""
    unit = draw(st.sampled_from(UNITS))
    whole = draw(st.integers(0, 10**12))
    number = str(whole)
    if unit == 'dur':
        fraction = draw(st.floats(0, 10, allow_nan=False))
        number = draw(st.sampled_from([number, repr(fraction), f'{fraction:.3f}', f'{fraction:e}']))
    else:
        number = draw(st.sampled_from([number, f'{number}.0', f'{whole:_}']))
    return number + draw(st.sampled_from([unit, unit.upper(), unit.capitalize()]))


@pytest.fixture(scope='module')
def composer_time() -> Any:
    return pytest.importorskip('composer.core').Time


@given(text=_time_strings())
@example(text='0ba')
@example(text='1e-05dur')
@example(text='1e3ba')
@example(text='0.5DUR')
def test_time_strings_are_read_as_composer_reads_them(composer_time: Any, text: str) -> None:
    ours, theirs = Time.parse('start', text), composer_time.from_timestring(text)
    assert ours.value == theirs.value
    assert ours.unit == theirs.unit.value
    again = Time.parse('start', theirs)
    assert (again.value, again.unit) == (ours.value, ours.unit)


@pytest.mark.parametrize('unit', UNITS)
@pytest.mark.parametrize('number', ['-1', '-0.5', '-1e3'])
def test_negative_times_are_refused(number: str, unit: str) -> None:
    with pytest.raises(ValueError, match='start must'):
        Time.parse('start', number + unit)


@pytest.mark.parametrize('text', ['10sec', '1h30m', '45s', '2h'])
def test_seconds_are_refused(text: str) -> None:
    """Composer reads them; ranks and runs would not agree on them."""
    with pytest.raises(ValueError, match=f"end must not be in seconds, .* got '{text}'"):
        Time.parse('end', text)


@given(st.integers(0, 50), st.integers(1, 9), st.integers(0, 50), st.integers(1, 50))
def test_a_window_holds_the_steps_that_its_definition_names(batch: int, interval: int, start: int, length: int) -> None:
    window = Window.of(interval, f'{start}ba', f'{start + length}ba')
    expected = (batch + 1) % interval == 0 and start <= batch < start + length
    assert window.holds(Moment(batch)) is expected


# Schedules in a loop of one's own.


def _radii(method: SAM, steps: int) -> list[float]:
    """How far from the weights the second gradient of each step was taken."""
    model = network(torch.float64, dropout=0.0)
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), method, model)
    found = []
    for batch in batches(steps, torch.float64):
        places = []
        for _ in optimizer.passes():
            places.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
            Closure(model, batch)()
        found.append((places[-1] - places[0]).norm().item())
    return found


@pytest.mark.parametrize(
    'schedule',
    [
        lambda t: 1 / (1 + t.batch.value),  # a Composer Timestamp has .value
        lambda t: 1 / (1 + t.batch),
        lambda t: 1.0 if t.batch == 0 else 1 / (t.batch + 1),
        lambda t: 1 / int(t.batch + 1),
        lambda t: 1 / len(range(t.batch + 1)),
        lambda t: 2 / (2 * t.batch.value + 2),
    ],
)
def test_a_schedule_is_a_function_of_the_number_of_steps(schedule: Any) -> None:
    found = _radii(SAM(rho=0.1, schedules={'rho': schedule}), 5)
    assert found == pytest.approx([0.1 / (1 + step) for step in range(5)], rel=1e-9)


def test_a_schedule_goes_on_from_steps_taken() -> None:
    seen: list[int] = []
    model = network()
    method = SAM(schedules={'rho': lambda t: seen.append(t.batch) or 1.0})
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, model)
    seen.clear()
    optimizer.steps_taken = 40
    for batch in batches(2):
        optimizer.step(Closure(model, batch))
    assert set(seen) == {40, 41}


@given(st.integers(0, 10**9))
def test_a_count_is_the_number_it_counts(number: int) -> None:
    t = Timestamp(Count(number))
    assert t.batch == t.batch.value == number
    assert type(t.batch.value) is int
    assert t.batch + 1 == number + 1
    assert t.batch // 3 == number // 3
    assert (t.batch < 5) is (number < 5)
    assert t.batch / 4 == number / 4


@pytest.mark.parametrize('unit', ['ep', 'dur', 'sp'])
def test_a_loop_of_ones_own_tells_the_time_in_steps_only(unit: str) -> None:
    assert Moment(7).elapsed('ba') == 7
    with pytest.raises(ValueError, match=f"in steps \\(ba\\), not in '{unit}'"):
        Moment(7).elapsed(unit)

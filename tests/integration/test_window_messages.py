"""What is said of a window that does not fit the run: before it begins where that can be told, otherwise at its end."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from digits import METHODS, PER_EPOCH, Recorder, build

from composer_sam import SAM, registry

SEVERAL_PASSES = [name for name in METHODS if registry[name]().passes > 1]


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith('composer_sam') and record.levelno == logging.WARNING
    ]


def _first_step(caplog: pytest.LogCaptureFixture) -> tuple[Recorder, list[list[str]]]:
    """A recorder, and the warnings there were before each batch."""
    said: list[list[str]] = []
    return Recorder(lambda batch, at, state: said.append(_warnings(caplog))), said


@pytest.mark.parametrize('start', ['5ep', '20ba', '1ep', '1dur'])
@pytest.mark.parametrize('name', SEVERAL_PASSES)
def test_a_start_that_is_never_reached(name: str, start: str, caplog: pytest.LogCaptureFixture) -> None:
    recorder, said = _first_step(caplog)
    build(registry[name](start=start), recorder=recorder, max_duration='1ep').fit()
    before = f"start='{start}' is never reached in a run of 1ep: {name} will perturb no step"
    assert said == [[before]] * PER_EPOCH, 'not said before the first batch'
    at_the_end = _warnings(caplog)[1:]
    assert len(at_the_end) == 1
    assert at_the_end[0].startswith(f'{name}(')
    assert at_the_end[0].endswith(
        f'perturbed none of the {PER_EPOCH} steps that were taken: they were plain steps of SGD'
    )
    assert recorder.passes == [1] * PER_EPOCH


@pytest.mark.parametrize('end', ['5ep', '20ba'])
def test_an_end_that_is_never_reached(end: str, caplog: pytest.LogCaptureFixture) -> None:
    recorder, said = _first_step(caplog)
    build(SAM(end=end), recorder=recorder, max_duration='1ep').fit()
    assert said[0] == [f"end='{end}' is never reached in a run of 1ep"]
    assert _warnings(caplog) == said[0]
    assert recorder.passes == [2] * PER_EPOCH


@pytest.mark.parametrize(
    'window',
    [
        {},
        {'start': '3ba'},
        {'end': '3ba'},
        {'end': '1ep'},  # as long as the run
        {'end': f'{PER_EPOCH}ba'},
        {'end': '0.5dur'},
        {'interval': PER_EPOCH},
    ],
    ids=str,
)
def test_a_window_that_fits_is_not_spoken_of(window: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    build(SAM(**window), max_duration='1ep').fit()
    assert _warnings(caplog) == []


def test_a_run_without_a_perturbed_step_says_so_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    recorder, said = _first_step(caplog)
    method = SAM(rho=0.1, interval=PER_EPOCH + 1)
    build(method, recorder=recorder, max_duration='1ep').fit()
    assert said == [[]] * PER_EPOCH
    assert _warnings(caplog) == [
        f'{method} perturbed none of the {PER_EPOCH} steps that were taken: they were plain steps of SGD'
    ]


@pytest.mark.parametrize(('start', 'end'), [('1ep', '3ba'), (f'{PER_EPOCH}ba', '1ep'), ('0.5dur', '1ep')])
def test_a_start_behind_the_end_in_other_units_is_an_error_before_training(start: str, end: str) -> None:
    """An epoch has four steps and the run has two epochs: only the Trainer can tell that."""
    recorder = Recorder()
    trainer = build(SAM(start=start, end=end), recorder=recorder, max_duration='2ep')
    with pytest.raises(
        ValueError,
        match=f"start must lie before end, got start='{start}' and end='{end}' in a run of 2ep",
    ):
        trainer.fit()
    assert trainer.state.timestamp.batch == 0
    assert recorder.passes == []

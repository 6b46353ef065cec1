"""Reports are resumed after an interruption, and the figures in README and docs are those of the reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D

import benchmarks.report
from benchmarks.before_after import compared
from benchmarks.pareto import draw, front
from benchmarks.quality_runs import Candidate, Remedy, Task, equal_compute, train
from benchmarks.readme import FIGURES, FILES, filled
from benchmarks.report import RESULTS, Report, Table


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.name)
def test_figures_are_those_of_the_reports(file: Path) -> None:
    text = file.read_text()
    assert '<!-- figures: ' in text
    assert filled(text) == text, 'the reports have changed: run python -m benchmarks.readme'


def test_a_figure_typed_by_hand_is_replaced() -> None:
    marked = '<!-- figures: results -->\nSAM costs nothing\n<!-- end of figures -->\n'
    assert filled(marked) == f'<!-- figures: results -->\n{FIGURES["results"]()}<!-- end of figures -->\n'


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(benchmarks.report, 'WORK', tmp_path / 'work')
    return tmp_path


def test_a_report_that_was_cut_off_goes_on(kept: Path) -> None:
    measured: list[str] = []

    def case(name: str, fail: bool = False) -> list[list[object]]:
        measured.append(name)
        if fail:
            raise KeyboardInterrupt
        return [[name, 0.5]]

    def run(fail: bool, **config: int) -> list[Sequence[object]]:
        report = Report('trial', {'rounds': 3, 'json': 'ignored', **config}, kept / 'trial')
        table = Table('Times', ('case', 'seconds'))
        for name in ('first', 'second'):
            for row in report.case(name, lambda name=name: case(name, fail and name == 'second')):
                table.add(*row)
        report.add(table)
        report.write()
        return list(table.rows)

    with pytest.raises(KeyboardInterrupt):
        run(fail=True)
    assert measured == ['first', 'second']
    rows = run(fail=False)
    assert measured == ['first', 'second', 'second']
    assert [list(row) for row in rows] == [['first', 0.5], ['second', 0.5]]
    written = json.loads((kept / 'trial.json').read_text())
    assert written['config'] == {'rounds': 3}
    assert {'date', 'cpu', 'torch', 'mosaicml', 'commit'} <= set(written['environment'])
    assert set(written['environment']['cases']['first']) == {'date', 'load', 'seconds'}
    run(fail=False)
    assert len(measured) == 3
    run(fail=False, rounds=4)  # other options: nothing that is kept is theirs
    assert len(measured) == 5


def test_another_state_of_the_code_is_measured_anew(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Report('trial', {}, kept / 'trial').case('only', lambda: 1)
    assert Report('trial', {}, kept / 'trial').case('only', lambda: 2) == 1
    monkeypatch.setattr(benchmarks.report, 'code', lambda: 'another')
    assert Report('trial', {}, kept / 'trial').case('only', lambda: 2) == 2


def test_the_front_is_what_nothing_cheaper_beats() -> None:
    points = [(1.0, 75.0), (2.0, 97.0), (2.0, 80.0), (1.1, 74.0), (4.0, 97.0), (1.5, 96.0)]
    assert front(points) == [(1.0, 75.0), (1.5, 96.0), (2.0, 97.0)]


def test_a_candidate_is_named_by_everything_that_it_changes() -> None:
    assert Candidate('SAM', (('rho', 0.5), ('interval', 10))).name == 'SAM, rho 0.5, interval 10'
    assert Candidate('SAM', (('rho', 0.5), ('start', '30ep'))).name == 'SAM, rho 0.5, start 30ep'
    assert Candidate(longer=2).name == 'SGD, 2 times the epochs'
    assert Candidate(longer=1.25).name == 'SGD, 1.25 times the epochs'
    assert Candidate(remedy=Remedy('weight decay 0.01', ())).name == 'SGD, weight decay 0.01'


def test_passes_are_counted_in_the_run(tmp_path: Path) -> None:
    expected = {
        Candidate(): 1,
        Candidate('SAM', (('rho', 0.1),)): 2,
        Candidate('SAM', (('rho', 0.1), ('interval', 3))): 1 + 14 / 42,
        Candidate('SAM', (('rho', 0.1), ('ascent_fraction', 0.25))): 1.25,
        Candidate('SAM', (('rho', 0.1), ('start', '1ep'))): 1.5,
        Candidate('MSAM', (('rho', 0.1),)): 1,
        Candidate('GAM', (('grad_rho', 0.02),)): 4,
    }
    task = Task('digits', 'yamls/digits/sgd.yaml', ('data.eval_batch_size=450',), 2, {})
    outcomes = train(task, list(expected), 1, tmp_path, False, 2)
    assert {candidate: outcome.passes for candidate, outcome in outcomes.items()} == {
        candidate: [pytest.approx(passes)] for candidate, passes in expected.items()
    }
    assert {outcome.steps for outcome in outcomes.values()} == {42}


def test_compute_is_equal_to_that_of_the_first_sgd_as_dear() -> None:
    assert [equal_compute(cost, (1, 1.25, 2)) for cost in (1.0, 1.09, 1.2, 1.3, 1.5, 2.1, 3.0)] == [
        *(1, 1, 1.25, 1.25, 2, 2, 2),
    ]


def test_methods_that_are_equal_are_all_seen() -> None:
    """SAM's marker is small, filled and on top; those of the others are open, larger, and of another shape each."""
    figure = draw(json.loads((RESULTS / 'quality.json').read_text()))
    (title,) = figure.texts
    said, how = title.get_text().splitlines()
    assert said == 'SAM is more accurate than SGD that trains for as long on 5 of 5 tasks, beyond the 95% interval'
    assert how == 'mean and standard deviation over 5 seeds'
    for axis in figure.axes:
        markers: dict[str, Line2D] = {}
        for bars in axis.containers:
            assert isinstance(bars, ErrorbarContainer)
            if not str(bars.get_label()).startswith('_'):
                markers[str(bars.get_label())] = bars.lines[0]
        sam = markers.pop('SAM')
        assert markers
        for other in markers.values():
            assert other.get_markerfacecolor() == 'none'
            assert sam.get_markersize() < other.get_markersize() and sam.get_zorder() > other.get_zorder()
        assert len({str(one.get_marker()) for one in (sam, *markers.values())}) == 1 + len(markers)


def test_a_change_is_shown_by_the_cases_of_sam_that_both_reports_have() -> None:
    columns = ['tensors', 'parameters', 'variant', 'µs beyond the passes', "x Composer's SAM", 'x memory floor']

    def report(*rows: list[Any]) -> dict[str, Any]:
        return {
            'environment': {'commit': 'abc', 'date': '2026-11-21T10:00:00'},
            'tables': [{'title': 'sizes', 'columns': columns, 'rows': list(rows)}],
        }

    before = report([10, 1e4, 'SAM', 9.0, 3.0, 5.0], [10, 1e4, 'GAM', 1.0, 1.0, 1.0])
    after = report([10, 1e4, 'SAM', 3.0, 1.0, 2.0], [100, 1e4, 'SAM', 1.0, 1.0, 1.0])
    table = compared(before, after)
    assert table.rows == [('10 tensors, 1e+04 parameters', 9.0, 3.0, 5.0, 3.0, 1.0, 2.0)]
    assert table.note.endswith('Before: commit abc, of 2026-11-21.')

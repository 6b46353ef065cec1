"""The tables, the verdict and the picture of the benchmark of cheap settings, from results made up here."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import benchmarks.cifar
import benchmarks.readme
from benchmarks.quality import tasks
from benchmarks.quality_runs import Outcome
from benchmarks.readme import FIGURES
from benchmarks.thrift_picture import draw
from benchmarks.thrift_tables import (
    NONE,
    SHARES_COLUMNS,
    goal,
    remedies_table,
    settings_table,
    share_kept,
    shares_table,
    verdict,
    with_gain,
)
from benchmarks.thrift_variants import LONGER, REMEDIES, radii, variants

RHO = 0.5


def found(task: str, sam: float, cheap: dict[str, float]) -> dict[str, Any]:
    """Return the results of a task: SGD has 50 %, SAM gains ``sam`` points, and every setting of ``cheap`` its own."""

    def row(variant: str, family: str, gain: float, passes: float, longer: float = 1) -> dict[str, Any]:
        accuracy = [50 + gain + spread for spread in (-0.1, 0.0, 0.1)] if gain else [50.2, 50.0, 49.8]
        outcome = Outcome(accuracy, [0.1] * 3, [2 * passes * longer] * 3, [passes] * 3, 100)
        named = {'variant': variant, 'family': family, 'candidate': variant, 'longer': longer, 'chosen': True}
        return {**named, **asdict(outcome)}

    rows = [row('SGD' if longer == 1 else f'SGD, {longer}', 'SGD', 0, 1, longer) for longer in LONGER]
    rows.append(row('SAM', 'SAM', sam, 2))
    rows += [row(name, 'interval', gain, 1.2) for name, gain in cheap.items()]
    rows += [row(f'SGD, {remedy}', 'remedy', 2, 1) for remedy in REMEDIES]
    rows += [row(f'SAM, {remedy}', 'remedy', 3, 2) for remedy in REMEDIES]
    return {'task': task, 'tested': rows, 'validated': []}


def said(*results: dict[str, Any]) -> str:
    table = shares_table(results)
    return verdict([dict(zip(table.columns, row, strict=True)) for row in table.rows])


def test_a_share_is_kept_of_a_gain_that_is_there() -> None:
    assert share_kept(9.0, (10.0, 2.0)) == pytest.approx(90)
    assert share_kept(-5.0, (10.0, 2.0)) == pytest.approx(-50)
    assert share_kept(9.0, (0.2, 0.3)) == NONE
    assert share_kept(9.0, (-1.0, 0.3)) == NONE


def test_the_goal_is_a_price_and_a_share() -> None:
    assert goal(1.25, 90) and goal(1.0, 120)
    assert not goal(1.27, 120) and not goal(1.25, 89.9)


def test_the_setting_that_keeps_most_everywhere_is_first() -> None:
    results = [
        found('one', 10, {'even': 8, 'uneven': 9.5}),
        found('two', 20, {'even': 16, 'uneven': 2}),
        found('none', 0, {'even': 1, 'uneven': 1}),
    ]
    assert with_gain(results) == ['one', 'two']
    table = shares_table(results)
    assert tuple(table.columns) == (*SHARES_COLUMNS, 'one', 'two')
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row['variant'] for row in rows] == ['SAM', 'even', 'uneven']
    assert [row['smallest share'] for row in rows] == [pytest.approx(share) for share in (100, 80, 10)]
    assert [row['goal'] for row in rows] == ['no', 'no', 'no']
    assert (rows[1]['passes'], rows[1]['one'], rows[1]['two']) == (1.2, pytest.approx(80), pytest.approx(80))


def test_the_verdict_names_what_reaches_the_goal() -> None:
    assert said(found('one', 10, {'good': 9.5, 'bad': 1})) == (
        "At 1.25 passes per step or less, good keeps 95 % of SAM's gain or more on every task."
    )


def test_the_verdict_says_where_the_nearest_falls_short() -> None:
    results = found('one', 10, {'near': 8.5, 'far': 1}), found('two', 20, {'near': 19, 'far': 20})
    assert said(*results) == (
        'No setting at 1.25 passes per step or less keeps 90 % of SAM\'s gain on every task. The nearest, "near" at '
        '1.2 passes, keeps 85 % on one.'
    )
    assert said(found('none', 0, {'any': 1})) == 'SAM has a gain on none of the tasks, so there is nothing to keep.'


def test_a_gain_is_compared_with_sgd_of_the_same_compute() -> None:
    table = settings_table([found('one', 10, {'cheap': 8})])
    rows = {row[1]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows['cheap']['SGD at equal compute'] == 'SGD, 1.25'
    assert rows['SAM']['SGD at equal compute'] == 'SGD, 2'
    assert rows['cheap']['against SAM'] == pytest.approx(-2)
    assert rows['cheap']["share of SAM's gain (%)"] == pytest.approx(80)


def test_a_remedy_is_compared_with_sgd_and_sam_with_the_same_remedy() -> None:
    table = remedies_table([found('one', 10, {})])
    rows = {row[1]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == ['none', *REMEDIES]
    assert rows['none']['gain of SAM beside it'] == pytest.approx(10)
    assert rows['EMA']['gain of the remedy'] == pytest.approx(2)
    assert rows['EMA']['gain of SAM beside it'] == pytest.approx(1)


@pytest.mark.parametrize('name', ['digits-40', 'cifar10-small'])
def test_every_setting_has_a_name_and_candidates_of_its_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks.cifar, 'WORK', tmp_path / 'work')
    for split in ('train', 'test'):
        (tmp_path / split).mkdir()
    task = tasks(lambda: tmp_path)[name]()
    every = variants(task, RHO)
    assert len({variant.name for variant in every}) == len(every)
    candidates = [candidate.name for variant in every for candidate in variant.candidates]
    assert len(set(candidates)) == len(candidates)
    assert any('normalization' in variant.name for variant in every) == (name == 'cifar10-small')
    assert len(radii(task)) == len(task.radii['SAM'])


def test_the_picture_names_every_setting_and_says_what_it_shows() -> None:
    results = [found('one', 10, {'interval=2': 9.5, 'interval=5': 9.4, 'interval=10': -30})]
    table = shares_table(results)
    figure = draw({'tables': [asdict(table)]})
    (axis,) = figure.axes
    assert axis.get_title() == (
        "interval=2 keeps 95 % of SAM's gain at 1.2 passes per step, on one\n(the goal: 90 % at 1.25 passes or less)"
    )
    assert {text.get_text().strip() for text in axis.texts} == {
        *('SAM', 'interval=2', 'interval=5', 'interval=10', 'the goal'),
    }


def test_the_docs_get_the_verdict_and_both_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [found('one', 10, {'good': 9.5}), found('none', 0, {'good': 1})]
    report = {'tables': [asdict(shares_table(results)), asdict(remedies_table(results))]}
    (tmp_path / 'thrift.json').write_text(json.dumps(report))
    monkeypatch.setattr(benchmarks.readme, 'RESULTS', tmp_path)
    shares, remedies = FIGURES['thrift'](), FIGURES['remedies']()
    assert shares.startswith(
        "At 1.25 passes per step or less, good keeps 95 % of SAM's gain or more on every task.\n\n|"
    )
    assert '| good | 1.20 | 95 % | yes | 95 % |' in shares
    assert '| one | EMA | 52.0 ± 0.1 % | +2.0 ± 0.7 | 53.0 ± 0.1 % | +1.0 ± 0.0 |' in remedies

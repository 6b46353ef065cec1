"""What a survival study says of its losses: frontiers, equal learning, spreads, and what could not be measured."""

from __future__ import annotations

from typing import Any

import pytest

from composer_sam.studies.result import RunResult
from composer_sam.studies.survival.picture import draw
from composer_sam.studies.survival.results import Finetuned, Measured
from composer_sam.studies.survival.tables import Survivor, common_level, least_lost, lost_at, survivors, tables

LOSSES = 'Loss on the first text, and how much quantised and noisy weights lose'
EMPTY: dict[str, Any] = {'train': {}, 'test': {}, 'geometry': None, 'config': {}, 'versions': {}}


def run(recipe: str, seed: int, **values: object) -> RunResult:
    name = f'{recipe}-{seed}'
    numbers = {'accuracy': None, 'test_loss': None, 'train_loss': None, 'steps': 1, 'seconds': 1.0, 'threads': 1}
    return RunResult(name=name, recipe=recipe, values=values, seed=seed, sharpness=None, **numbers, **EMPTY)  # pyright: ignore


def survivor(
    recipe: str, seed: int, loss: float | None, tuned: list[tuple[float | None, float | None]], before: float = 3.0
) -> Survivor:
    """A network with its losses on the other text and on the first after each fine-tuning."""
    one = run(recipe, seed)
    grown = None if loss is None else loss + 0.5
    measured = Measured(one.name, loss, {'8': loss, '4': grown}, {'0.1': [loss, grown]}, 8, {})
    tunings = [
        Finetuned(f'{one.name}-{number}', one.name, {'optimizer.lr': 10.0**number}, before, after, first, 1, 1.0, {})
        for number, (after, first) in enumerate(tuned)
    ]
    (found,) = survivors([one], [measured], tunings)
    return found


def test_a_frontier_has_the_points_that_no_other_beats() -> None:
    one = survivor('SAM', 0, 2.0, [(2.5, 2.1), (2.2, 2.3), (2.4, 2.6), (2.2, 2.4)])
    assert one.points[0] == (3.0, 0.0)
    assert [other for other, _ in one.frontier] == [3.0, 2.5, 2.2]
    assert [lost for _, lost in one.frontier] == pytest.approx([0.0, 0.1, 0.3])


def test_what_is_lost_at_a_level_lies_on_the_line_between_two_points() -> None:
    frontier = [(3.0, 0.0), (2.5, 0.1), (2.2, 0.4)]
    assert lost_at(frontier, 2.75) == pytest.approx(0.05)
    assert lost_at(frontier, 2.3) == pytest.approx(0.1 + 0.3 * 2 / 3)
    assert lost_at(frontier, 2.5) == pytest.approx(0.1)
    assert lost_at(frontier, 3.5) == 0.0  # known before the fine-tuning
    assert lost_at(frontier, 2.1) is None
    assert lost_at([], 2.1) is None


def test_the_common_level_is_the_best_that_all_reach() -> None:
    found = [survivor('A', 0, 2.0, [(2.5, 2.1), (2.2, 2.3)]), survivor('B', 0, 2.0, [(2.6, 2.1), (2.3, 2.3)])]
    assert common_level(found) == 2.3
    assert common_level([survivor('A', 0, 2.0, [])]) is None


def cells(title: str, found: list[Survivor]) -> dict[str, list[str]]:
    (rows,) = [rows for name, _, rows in tables(found) if name == title or name.startswith(f'{title}:')]
    return {label: rest for label, *rest in rows}


def test_cells_are_means_and_deviations_over_the_seeds() -> None:
    found = [survivor('A', seed, loss, [(2.5, loss + 0.25)]) for seed, loss in ((0, 2.0), (1, 2.2))]
    assert cells(LOSSES, found) == {
        'A': ['2', '2.1000 ± 0.1414', '0.0000 ± 0.0000', '0.5000 ± 0.0000', '0.2500 ± 0.0000']
    }
    tuned = cells('Fine-tuned on the other text, lr 1', found)['A']
    assert tuned[1:4] == ['3.0000 ± 0.0000', '2.5000 ± 0.0000', '2.3500 ± 0.1414']
    assert cells('At equal learning', found)['A'] == ['2', '2.3500 ± 0.1414', '0.2500 ± 0.0000']


def test_what_is_not_finite_is_named_and_not_averaged() -> None:
    found = [survivor('A', 0, 2.0, [(None, None), (2.5, 2.1)]), survivor('A', 1, 2.0, [(2.4, 2.1), (2.5, 2.1)])]
    assert cells('Fine-tuned on the other text, lr 1', found)['A'][2] == 'none for 1 of 2'
    draw(found)


def test_the_title_says_who_lost_least() -> None:
    found = [
        survivor(label, seed, 2.0, [(2.5, 2.0 + lost)]) for label, lost in (('A', 0.2), ('B', 0.1)) for seed in (0, 1)
    ]
    assert least_lost(found) == [
        ('at equal learning', 'B', pytest.approx(0.1)),
        ('at 4 bits', 'A', pytest.approx(0.5)),
        ('with noise 0.1', 'A', pytest.approx(0.25)),
    ]
    (title, _) = draw(found).texts[0].get_text().splitlines()
    assert title == 'Least lost at equal learning: B (0.1000); at 4 bits: A (0.5000); with noise 0.1: A (0.2500)'


def test_nobody_is_named_where_a_number_is_missing() -> None:
    assert least_lost([survivor('A', 0, 2.0, []), survivor('B', 0, None, [])]) == []
    assert least_lost([survivor('A', 0, 2.0, [(2.5, 2.1)])]) == []


def test_a_fine_tuning_that_failed_does_not_take_the_place_of_another() -> None:
    """Only the second rate of the first network was finished."""
    one, other = (survivor('A', seed, 2.0, [(2.5, 2.1), (2.2, 2.9)]) for seed in (0, 1))
    found = [Survivor(one.label, one.run, one.measured, one.finetuned[1:]), other]
    assert cells('Fine-tuned on the other text, lr 1', found)['A'][2] == 'none for 1 of 2'
    assert cells('Fine-tuned on the other text, lr 10', found)['A'][2] == '2.2000 ± 0.0000'


def test_a_network_that_was_not_tested_is_left_out() -> None:
    measured = Measured('A-0', 2.0, {}, {}, 8, {})
    assert [one.label for one in survivors([run('A', 0), run('B', 0)], [measured], [])] == ['A']


def test_the_values_of_a_grid_are_in_the_label() -> None:
    one = run('SAM', 0, **{'algorithms.sam.rho': 0.1})
    (found,) = survivors([one], [Measured(one.name, 2.0, {}, {}, 8, {})], [])
    assert found.label == 'SAM, rho 0.1'

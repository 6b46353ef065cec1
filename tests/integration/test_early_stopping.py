"""Early stopping: the epoch is chosen on validation images, never on the test set, and the result is that epoch's."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, Trainer
from composer.core import State
from composer.loggers import Logger
from rich.console import Console

from composer_sam.commands.studies import DEMO
from composer_sam.recipes import History, RecipeError, build_trainer, load_recipe
from composer_sam.recipes import data as recipe_data
from composer_sam.recipes.data import Images, build_data
from composer_sam.recipes.schema import Digits
from composer_sam.studies.compare import Run, draw, tabulate
from composer_sam.studies.problem import build_problem

ROOT = Path(__file__).resolve().parents[2]
EARLY = ROOT / 'yamls' / 'digits' / 'sgd_early.yaml'


class Weights(Callback):
    """Keeps the weights of every epoch."""

    def __init__(self) -> None:
        self.by_epoch: dict[int, dict[str, torch.Tensor]] = {}

    def epoch_end(self, state: State, logger: Logger) -> None:
        del logger
        self.by_epoch[state.timestamp.epoch.value] = copy.deepcopy(dict(state.model.state_dict()))


def build(history: History, *callbacks: Callback, **changes: Any) -> Trainer:
    changes = {'max_duration': '6ep', 'trainer.progress_bar': 'false'} | changes
    return build_trainer(
        load_recipe(EARLY, (), [f'{key}={value}' for key, value in changes.items()]), [history, *callbacks]
    )


def run(*callbacks: Callback, **changes: Any) -> tuple[History, dict[str, torch.Tensor]]:
    history = History()
    trainer = build(history, *callbacks, **changes)
    trainer.fit()
    trainer.close()
    return history, dict(trainer.state.model.state_dict())


def pairs(images: Any) -> set[bytes]:
    pixels, labels = images.__getitems__(list(range(len(images))))
    return {row.numpy().tobytes() for row in torch.cat([pixels.flatten(1), labels[:, None]], 1)}


def test_the_validation_images_are_training_images_with_their_noise_and_the_test_set_stays() -> None:
    section = Digits(name='digits', label_noise=0.4, batch_size=64)
    whole = build_data(section, seed=3)
    data = build_data(section.model_copy(update={'validation_fraction': 0.1}), seed=3, keep_test=True)
    assert data.validation is not None
    kept, held_out = pairs(data.train.dataset), pairs(data.validation.dataset)
    assert len(held_out) == 135 and not kept & held_out
    assert kept | held_out == pairs(whole.train.dataset)
    assert pairs(data.test.dataset) == pairs(whole.test.dataset)
    assert not held_out & pairs(whole.test.dataset)


def test_the_result_is_the_test_of_the_best_validation_epoch_and_so_is_the_network() -> None:
    weights = Weights()
    history, trained = run(weights, **{'optimizer.lr': 0.5, 'scheduler.alpha_f': 1.0})
    assert history.validation['epoch'] == history.test['epoch'] == [1, 2, 3, 4, 5, 6]
    best = max(history.validation['accuracy'])
    place = history.validation['accuracy'].index(best)  # the first of several
    assert history.stop is not None and history.stop.epoch == place + 1 < 6
    assert history.accuracy == history.stop.accuracy == history.test['accuracy'][place]
    assert history.loss == history.test['loss'][place]
    assert f'at epoch {place + 1}, chosen on validation images' in str(history)
    for name, value in weights.by_epoch[place + 1].items():
        assert torch.equal(trained[name], value)


def test_the_test_set_plays_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """With other test labels the epoch and the weights are the same, although another epoch would be best."""
    history, trained = run()
    digits = recipe_data._digits  # pyright: ignore[reportPrivateUsage]

    def with_other_tests(section: Digits) -> tuple[Images, Images, int]:
        train, test, classes = digits(section)
        test.labels = (test.labels + 1) % classes
        return train, test, classes

    monkeypatch.setattr(recipe_data, '_digits', with_other_tests)
    other, others_weights = run()
    assert other.test['accuracy'] != history.test['accuracy']
    assert history.stop is not None and other.stop is not None
    assert (other.stop.epoch, other.stop.validation) == (history.stop.epoch, history.stop.validation)
    assert all(torch.equal(trained[name], others_weights[name]) for name in trained)


def test_a_resumed_run_chooses_the_same_epoch(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        'optimizer.lr': 0.5,
        'scheduler.alpha_f': 1.0,
        'save_folder': tmp_path,
        'save_interval': '1ep',
        'autoresume': 'true',
    }
    whole, trained = run(**{**changes, 'save_folder': tmp_path / 'whole'})
    first = build(History(), **changes)
    assert whole.stop is not None
    first.fit(duration=f'{int(whole.stop.epoch) + 1}ep')  # it is killed after the best epoch
    first.close()
    for _ in range(2):  # the second time nothing is left to train
        history = History()
        trainer = build(history, **changes)
        if trainer.state.timestamp.epoch.value < 6:
            trainer.fit()
        trainer.eval()
        trainer.close()
        assert history.stop == whole.stop and history.accuracy == whole.accuracy
        assert all(torch.equal(trained[name], value) for name, value in trainer.state.model.state_dict().items())


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (['data.validation_fraction=0.0'], 'early_stopping: true needs validation images'),
        (['eval_interval=0'], 'early_stopping: true needs tests, and eval_interval is 0'),
        (['parallelism.fsdp.sharding_strategy=FULL_SHARD'], 'early_stopping: true keeps the weights of one process'),
    ],
)
def test_what_cannot_be_stopped_early_is_said_before_anything_is_read(changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(EARLY, (), changes)


def test_the_test_split_of_such_a_recipe_is_the_test_set() -> None:
    plain = load_recipe(ROOT / 'yamls' / 'digits' / 'sgd.yaml')
    (ours,), (theirs,) = (build_problem(recipe, 'test', 1000).batches for recipe in (load_recipe(EARLY), plain))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def result(name: str, seed: int, stop: float | None) -> Run:
    test = {'epoch': [1.0, 2.0, 3.0], 'accuracy': [0.5, 0.9, 0.7], 'loss': [2.0, 1.0, 1.5]}
    at = 2 if stop is None else int(stop) - 1
    return Run(
        name=f'{name}-{seed}',
        recipe=name,
        seed=seed,
        steps=6,
        seconds_per_step=0.001,
        accuracy=test['accuracy'][at],
        loss=test['loss'][at],
        train={'epoch': [1.0, 2.0, 3.0], 'loss': [2.0, 1.0, 0.5]},
        test=test,
        how='alone',
        config={},
        stop_epoch=stop,
    )


def test_the_table_and_the_picture_of_a_comparison_show_the_chosen_epochs() -> None:
    early = [result('early', 17, 2.0), result('early', 18, 1.0)]
    runs = [result('SGD', 17, None), result('SGD', 18, None), *early]
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(tabulate(runs))
    rows = [re.split(r'\s{2,}', line.strip()) for line in console.export_text().splitlines()]
    assert rows[0][2] == 'epoch'
    assert rows[1][:4] == ['SGD', '2', '3', '70.0 ± 0.0 %']
    assert rows[2][:4] == ['early', '2', '2, 1', '70.0 ± 28.3 %']
    accuracy = draw(runs, 'digits, 40 % of the training labels are wrong').axes[0]
    (stars,) = [line for line in accuracy.lines if line.get_marker() == '*']
    assert np.array_equal(stars.get_xydata(), [[2.0, 90.0], [1.0, 50.0]])
    figure = accuracy.get_figure()
    assert figure is not None
    assert [text.get_text() for text in figure.texts] == [
        'Test accuracy: SGD 70.0 %; early 70.0 %\n'
        'digits, 40 % of the training labels are wrong\nmean over 2 seeds; band: lowest to highest seed'
    ]
    plain = Console(width=200, file=io.StringIO(), record=True)
    plain.print(tabulate(runs[:2]))
    assert 'epoch' not in plain.export_text()


def test_the_demo_compares_with_sgd_that_is_stopped_early() -> None:
    recipes = [load_recipe(name) for name in DEMO]
    assert [recipe.name for recipe in recipes] == ['SGD', 'SGD, stopped early', 'SAM']
    sgd, early, _ = (recipe.model_dump(exclude={'name', 'early_stopping'}) for recipe in recipes)
    assert early['data'].pop('validation_fraction') == 0.1 and sgd['data'].pop('validation_fraction') == 0
    assert early == sgd and recipes[1].early_stopping


def test_a_short_run_of_the_sam_recipe_learns() -> None:
    """Without the growth of the radius the loss of this run stays at its initial value: 10 % accuracy."""
    history = History()
    overrides = ['max_duration=10ep', 'eval_interval=10ep', 'trainer.progress_bar=false']
    trainer = build_trainer(load_recipe(ROOT / 'yamls' / 'digits' / 'sam.yaml', (), overrides), [history])
    trainer.fit()
    trainer.close()
    assert history.accuracy > 0.8

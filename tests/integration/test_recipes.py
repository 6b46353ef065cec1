"""From a recipe to a trained network, through the real Trainer on real data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composer import Trainer
from PIL import Image

from composer_sam.recipes import History, RecipeError, build_trainer, is_finished, load_recipe

YAMLS = Path(__file__).parents[2] / 'yamls'
QUICK = ['max_duration=2ep', 'trainer.progress_bar=false']


def build(name: str, *overrides: str, history: History | None = None) -> Trainer:
    recipe = load_recipe(YAMLS / f'{name}.yaml', overrides=[*QUICK, *overrides])
    return build_trainer(recipe, [history] if history else [])


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(trainer.state.model.parameters()).detach().clone()


def train(name: str, *overrides: str) -> torch.Tensor:
    trainer = build(name, *overrides)
    trainer.fit()
    trainer.close()
    return weights(trainer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two classes that can be told apart."""
    root = tmp_path / 'images'
    for split, count in (('train', 8), ('val', 4)):
        for name, shade in (('dark', 40), ('light', 210)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new('RGB', (10, 10), (shade, shade + index, shade)).save(root / split / name / f'{index}.png')
    return root


@pytest.mark.parametrize('name', ['digits/sgd', 'digits/sam'])
def test_the_seed_decides_the_run(name: str) -> None:
    torch.manual_seed(1)
    first = train(name)
    torch.manual_seed(2)
    assert torch.equal(first, train(name))
    assert not torch.equal(first, train(name, 'seed=18'))


def test_history_is_what_happened() -> None:
    history = History()
    trainer = build('digits/sgd', 'eval_interval=2ep', 'max_duration=50ba', history=history)
    initial_step = trainer.state.timestamp.batch.value
    trainer.fit()
    trainer.close()
    assert (initial_step, history.steps) == (0, 50)
    # 21 steps make an epoch: two whole ones and eight steps, tested after the second and at the end.
    assert history.train['epoch'] == [1, 2, pytest.approx(2 + 8 / 21)]
    assert history.test['epoch'] == [2, pytest.approx(2 + 8 / 21)]
    assert history.train['loss'][0] > history.train['loss'][1]
    total = trainer.state.timestamp.total_wct.total_seconds()
    assert 0 < 49 * history.seconds_per_step < total
    metrics = trainer.state.eval_metrics['eval']
    assert history.test['accuracy'][-1] == pytest.approx(float(metrics['MulticlassAccuracy'].compute()))
    assert history.test['loss'][-1] == pytest.approx(float(metrics['CrossEntropy'].compute()))


def test_the_resolved_recipe_is_saved_beside_the_checkpoints_and_repeats_the_run(tmp_path: Path) -> None:
    run = tmp_path / '{run_name}'
    expected = train('digits/sam', f'save_folder={run}', 'run_name=first', 'save_interval=1ep')
    saved = sorted(path.name for path in (tmp_path / 'first').iterdir())
    assert saved == ['config.yaml', 'ep1-ba21-rank0.pt', 'ep2-ba42-rank0.pt', 'latest-rank0.pt']
    trainer = build_trainer(load_recipe(tmp_path / 'first' / 'config.yaml', overrides=['run_name=second']))
    trainer.fit()
    trainer.close()
    assert torch.equal(weights(trainer), expected)


@pytest.mark.parametrize('name', ['digits/sgd', 'digits/sam'])
def test_autoresume_goes_on_as_if_never_interrupted(tmp_path: Path, name: str) -> None:
    schedule = 'scheduler.t_max=40ba'
    expected = train(name, schedule)
    checkpointed = [schedule, f'save_folder={tmp_path}', 'autoresume=true', 'save_interval=5ba']
    train(name, *checkpointed, 'max_duration=25ba')
    trainer = build(name, *checkpointed)
    assert trainer.state.timestamp.batch.value == 25
    assert not is_finished(trainer.state)
    trainer.fit()
    trainer.close()
    assert torch.equal(weights(trainer), expected)
    finished = build(name, *checkpointed)
    assert is_finished(finished.state)
    finished.close()


def test_load_path_starts_from_a_checkpoint(tmp_path: Path) -> None:
    expected = train('digits/sgd', f'save_folder={tmp_path}')
    trainer = build('digits/sgd', f'load_path={tmp_path}/latest-rank0.pt', 'trainer.load_weights_only=true')
    assert torch.equal(weights(trainer), expected)
    trainer.close()


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (
            ['data={name: image_folder, root: nowhere}', 'save_folder={folder}'],
            r"^data\.root: 'nowhere' is no directory",
        ),
        (['save_folder={file}/runs'], r'^save_folder: .* cannot be written, .* is a file$'),
        (['save_folder=/proc/runs'], r"^save_folder: '/proc/runs' cannot be written"),
        (['data.batch_size=2000', 'save_folder={folder}'], r'^data\.batch_size: 2000 is more than'),
    ],
)
def test_what_cannot_be_run_is_refused_and_leaves_nothing(
    tmp_path: Path,
    overrides: list[str],
    message: str,
) -> None:
    file, runs = tmp_path / 'file', tmp_path / 'runs'
    file.touch()
    filled = [override.replace('{file}', str(file)).replace('{folder}', str(runs)) for override in overrides]
    base = tmp_path / 'base.yaml'
    base.write_text(
        'max_duration: 1ep\ndevice: cpu\ndata: {name: digits}\nmodel: {name: mlp}\noptimizer: {name: sgd, lr: 0.1}\n',
    )
    with pytest.raises(RecipeError, match=message):
        build_trainer(load_recipe(base, overrides=filled))
    assert not runs.exists()


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A test run as root may write anywhere, so the answer of the system is put in its place.
    monkeypatch.setattr('composer_sam.recipes.build.os.access', lambda path, mode: False)
    with pytest.raises(RecipeError, match=r'^save_folder: .* cannot be written, no permission in '):
        load_recipe(YAMLS / 'digits' / 'sgd.yaml', overrides=[f'save_folder={tmp_path}/runs'])


def test_loggers_and_callbacks_of_composer_are_used(tmp_path: Path) -> None:
    overrides = [
        f'loggers.tensorboard.log_dir={tmp_path}/tb',
        f'loggers.file={{filename: {tmp_path}/log.txt, capture_stdout: false, capture_stderr: false}}',
        'callbacks.lr_monitor={}',
        'run_name=logged',
    ]
    train('digits/sam', *overrides)
    assert list((tmp_path / 'tb').rglob('events.out.tfevents*'))
    log = (tmp_path / 'log.txt').read_text()
    assert 'metrics/eval/MulticlassAccuracy' in log
    assert 'lr-SGD/group0' in log


@pytest.mark.parametrize('recipe', ['resnet18_sgd', 'resnet18_sam'])
def test_the_cifar_recipes_train_on_an_image_folder(folder: Path, recipe: str) -> None:
    history = History()
    overrides = ['data.name=image_folder', f'data.root={folder}', 'data.image_size=8', 'data.batch_size=8']
    quick = ['data.num_workers=0', 'device=cpu', 'optimizer.lr=0.01', 'max_duration=4ep']
    trainer = build(f'cifar10/{recipe}', *overrides, *quick, history=history)
    trainer.fit()
    trainer.close()
    assert history.steps == 8
    assert history.train['loss'][-1] < history.train['loss'][0]


def test_other_options_of_the_trainer_reach_it() -> None:
    history = History()
    options = ['trainer.train_subset_num_batches=3', 'device_train_microbatch_size=16', 'eval_interval=0']
    trainer = build('digits/sgd', *options, history=history)
    trainer.fit()
    trainer.close()
    assert trainer.state.device_train_microbatch_size == 16
    assert (history.steps, history.test['epoch']) == (6, [])

"""Recipes that name functions of the user's own: the example of the docs, and the one line that a mistake gets."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from composer_sam.commands.main import main
from composer_sam.recipes import RecipeError, build_trainer, load_recipe
from composer_sam.studies.problem import build_problem

ROOT = Path(__file__).parents[2]
EXAMPLE = 'examples/own.yaml'
MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from composer.models import ComposerClassifier

calls = []
ones = TensorDataset(torch.ones(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64))

def data(size: int = 8): calls.append(size); return ones, ones, 2
def no_tuple(): return ones
def two(): return ones, ones
def one_class(): return ones, ones, 1
def no_data(): return 3, ones, 2
def empty(): return TensorDataset(torch.ones(0, 2), torch.ones(0)), ones, 2
def unlabelled(): return TensorDataset(torch.ones(8, 1)), ones, 2
def high(): return TensorDataset(torch.ones(8, 1), torch.full((8,), 7)), ones, 2
def fails(): return {}['missing']

def model(num_classes: int, width: int = 3): return nn.Sequential(nn.Flatten(), nn.Linear(16, num_classes))
def no_module(): return 3
def wrapped(num_classes): return ComposerClassifier(model(num_classes), num_classes=num_classes)
def frozen(): return nn.ReLU()
def narrow(): return nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
def mismatch(): return nn.Sequential(nn.Flatten(), nn.Linear(15, 2))
def required(depth: int): return model(2)
value = 3
"""
BASE = """
max_duration: 1ep
device: cpu
data: {name: 'own_module:data', batch_size: 4}
model: {name: 'own_module:model'}
optimizer: {name: sgd, lr: 0.1}
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe in the current directory that names functions of a module there."""
    (tmp_path / 'own_module.py').write_text(MODULE)
    (tmp_path / 'broken.py').write_text('1 / 0')
    (tmp_path / 'base.yaml').write_text(BASE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    for name in ('own_module', 'broken'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return 'base.yaml'


def test_the_example_of_the_docs_trains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert main(['train', EXAMPLE]) == 0
    output = capsys.readouterr().out
    assert output.startswith('wine: test accuracy ')
    assert float(re.findall(r'accuracy ([\d.]+)%', output)[0]) > 90


def test_the_example_is_compared_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipes = [EXAMPLE, f'{EXAMPLE}+yamls/methods/sam.yaml']
    assert main(['compare', *recipes, 'max_duration=2ep', '--out', str(tmp_path), '--sharpness', '--jobs', '2']) == 0
    runs = json.loads((tmp_path / 'results.json').read_text())['runs']
    assert [run['recipe'] for run in runs] == ['wine', 'SAM']
    assert all(run['sharpness']['top_eigenvalue'] > 0 for run in runs)


def test_the_docs_show_the_example() -> None:
    page = (ROOT / 'docs' / 'own.md').read_text()
    for name, language in (('own.py', 'python'), ('own.yaml', 'yaml')):
        (shown,) = re.findall(rf'<!-- examples/{name} -->\n```{language}\n(.*?)```', page, flags=re.DOTALL)
        assert (ROOT / 'examples' / name).read_text().endswith(shown)


def test_noise_and_validation_samples_are_those_of_every_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    clean, noisy = (
        build_problem(load_recipe(EXAMPLE, overrides=[f'data.label_noise={noise}']), 'train', 1000)
        for noise in (0.0, 0.4)
    )
    differing = [(a[1] != b[1]).float().mean().item() for a, b in zip(clean.batches, noisy.batches, strict=True)]
    assert differing == [pytest.approx(0.4, abs=0.01)]
    held_out = load_recipe(EXAMPLE, overrides=['data.validation_fraction=0.2'])
    sizes = [build_problem(held_out, split, 1000).samples for split in ('train', 'test')]
    assert sizes == [100, 25]


def test_a_recipe_calls_nothing_before_it_trains(base: str) -> None:
    recipe = load_recipe(base, overrides=['data.size=3'])
    assert sys.modules['own_module'].calls == []
    trainer = build_trainer(recipe)
    assert sys.modules['own_module'].calls == [3]
    trainer.fit()
    trainer.close()
    assert load_recipe(base, overrides=['data.size=3']) == recipe


def test_the_saved_recipe_names_the_functions_and_their_arguments(base: str, tmp_path: Path) -> None:
    trainer = build_trainer(load_recipe(base, overrides=['data.size=3', 'model.width=5', 'save_folder=runs']))
    trainer.close()
    saved = load_recipe(tmp_path / 'runs' / 'config.yaml')
    assert saved.data.model_dump()['size'] == 3
    assert saved.model.model_dump()['width'] == 5


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (['data.name="nowhere:data"'], r"^data\.name: 'nowhere:data' cannot be imported \(No module named 'nowhere'\)"),
        (
            ['data.name="broken:data"'],
            r'^data\.name: broken:data cannot be imported: ZeroDivisionError: .*broken\.py, l',
        ),
        (['data.name="own_module:dta"'], r"^data\.name: own_module has no function 'dta'; did you mean data"),
        (['data.name="own_module:value"'], r"^data\.name: own_module has no function 'value'"),
        (['data.name="own_module:"'], r"^data\.name: 'own_module:' is not of the form package\.module:function$"),
        (['data.name=own_module.data'], r'^data\.name: unknown name .*; a function of your own is written package'),
        (['data.sise=3'], r'^data\.sise: unknown key \(value 3\); did you mean size\?$'),
        (['data.size=big'], r"^data\.size: must be an integer, got 'big'$"),
        (['data.name="own_module:no_tuple"'], r'^data\.name: own_module:no_tuple must return \(train, test, num_cl'),
        (['data.name="own_module:two"'], r'must return .*; it returned a tuple of TensorDataset, TensorDataset$'),
        (['data.name="own_module:one_class"'], r'must return an integer >= 2 as the number of classes, got 1$'),
        (
            ['data.name="own_module:no_data"'],
            r'^data\.name: the training data of own_module:no_data must be a data set',
        ),
        (['data.name="own_module:empty"'], r'^data\.name: the training data of own_module:empty is empty$'),
        (
            ['data.name="own_module:unlabelled"'],
            r'must have \(tensor, class\) samples; the first is a tuple of Tensor$',
        ),
        (
            ['data.name="own_module:high"'],
            r'must have integers from 0 to 1 as classes; that of the first .* tensor\(7\)',
        ),
        (
            ['data.name="own_module:fails"'],
            r"^data\.name: own_module:fails failed: KeyError: 'missing' \(own_module\.py",
        ),
        (['model.num_classes=3'], r'^model\.num_classes: is filled in by the recipe itself'),
        (['model.name="own_module:required"'], r'^model\.depth: is required by required$'),
        (
            ['model.name="own_module:no_module"'],
            r'^model\.name: own_module:no_module must return a torch\.nn\.Module; .* int',
        ),
        (
            ['model.name="own_module:wrapped"'],
            r'^model\.name: own_module:wrapped returned a ComposerModel; return the net',
        ),
        (['model.name="own_module:frozen"'], r'has no parameters to train$'),
        (
            ['model.name="own_module:narrow"'],
            r'must return a tensor of scores of shape \(2, 2\) .* returned shape \(2, 1\)$',
        ),
        (['model.name="own_module:mismatch"'], r'does not take a batch of shape \(2, 1, 4, 4\): RuntimeError: '),
    ],
)
def test_a_mistake_is_one_line(base: str, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        build_trainer(load_recipe(base, overrides=overrides))
    assert '\n' not in str(caught.value)

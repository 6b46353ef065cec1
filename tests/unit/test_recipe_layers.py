"""Overlays, overrides and nulls: the name of a run follows what is trained, and what is lost is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from composer_sam.recipes import Recipe, RecipeError, load_recipe
from composer_sam.recipes.check import check_recipe

YAMLS = Path(__file__).parents[2] / 'yamls'
SGD, SAM = YAMLS / 'digits' / 'sgd.yaml', YAMLS / 'digits' / 'sam.yaml'
GAM = YAMLS / 'methods' / 'gam.yaml'


def loaded(path: Path | str, *changes: Path | str) -> tuple[Recipe, list[str]]:
    lines: list[str] = []
    overlays = [change for change in changes if isinstance(change, Path)]
    overrides = [change for change in changes if isinstance(change, str)]
    return load_recipe(path, overlays, overrides, lines.append), lines


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {
        'longer': 'max_duration: 90ep',
        'nosam': 'algorithms: {sam: null}',
        'named': 'name: mine\nseed: 3',
        'child': f'base: {SGD}\nalgorithms: {{sam: {{rho: 0.2}}}}',
        'empty': '',
    }.items():
        (tmp_path / f'{name}.yaml').write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ('path', 'changes', 'name'),
    [
        (SAM, [], 'SAM'),
        (SAM, ['optimizer.lr=0.05', 'max_duration=2ep', 'seed=3'], 'SAM'),
        (SAM, ['algorithms.sam=null'], 'SAM without sam'),
        (SAM, ['algorithms.sam=null', 'algorithms.gam={}'], 'SAM with gam without sam'),
        (SAM, ['algorithms.sam.rho=0.2'], 'SAM, rho=0.2'),
        (SAM, ['algorithms.sam.rho=0.5'], 'SAM'),
        (SAM, ['algorithms.sam.rho=null'], 'SAM, rho=null'),
        (SAM, [SGD], 'SGD with sam'),
        (SGD, [GAM], 'GAM'),
        (SGD, ['algorithms.sam.rho=0.2'], 'SGD with sam'),
        (SGD, ['model.name=cnn', 'model.width=4'], 'SGD, model=cnn, width=4'),
        (SGD, ['model.hidden=[32]'], 'SGD, hidden=[32]'),
        (SGD, ['optimizer.name=adamw'], 'SGD, optimizer=adamw'),
        (SGD, ['optimizer.name=Sgd'], 'SGD'),
        (SGD, ['data.name=cifar10'], 'SGD, data=cifar10'),
        (SGD, ['name=plain', 'algorithms.sam={}'], 'plain'),
        (SAM, ['name=null', 'algorithms.sam=null'], 'sam without sam'),
        (SGD, ['longer'], 'SGD+longer'),
        (SGD, ['longer', GAM], 'GAM'),
        (SAM, ['nosam'], 'SAM+nosam'),
        (SAM, ['named'], 'mine with sam'),
        ('child', [], 'SGD+child'),
    ],
)
def test_the_name_follows_what_is_trained(folder: Path, path: Path | str, changes: list[Path | str], name: str) -> None:
    files = {stem: folder / f'{stem}.yaml' for stem in ('longer', 'nosam', 'named', 'child')}
    changes = [files.get(str(change), change) for change in changes]
    recipe, _ = loaded(files.get(str(path), path), *changes)
    assert recipe.name == name


@pytest.mark.parametrize(
    ('path', 'overlay', 'line'),
    [
        (SAM, SGD, 'sgd.yaml over sam.yaml: replaced name; kept algorithms.sam'),
        (SGD, GAM, 'gam.yaml over sgd.yaml: replaced name; added algorithms.gam'),
        (SAM, 'nosam', 'nosam.yaml over sam.yaml: removed algorithms.sam'),
        (SGD, 'longer', 'longer.yaml over sgd.yaml: replaced max_duration'),
        (SGD, 'empty', 'empty.yaml over sgd.yaml: changes nothing'),
        (
            SAM,
            YAMLS / 'methods' / 'sam.yaml',
            f'{YAMLS}/methods/sam.yaml over {SAM}: replaced algorithms.sam.rho; added',
        ),
    ],
)
def test_an_overlay_says_what_it_changes_and_keeps(folder: Path, path: Path, overlay: Path | str, line: str) -> None:
    _, lines = loaded(path, folder / f'{overlay}.yaml' if isinstance(overlay, str) else overlay)
    (said,) = lines
    assert said.startswith(line)


def test_overlays_can_be_joined_to_a_recipe(tmp_path: Path) -> None:
    joined, lines = loaded(f'{SGD}+{GAM}', 'max_duration=2ep')
    assert (joined, lines) == loaded(SGD, GAM, 'max_duration=2ep')
    three, said = loaded(f'{SGD}+{GAM}+{YAMLS}/methods/gam.yaml')
    assert (three.name, len(said)) == ('GAM', 2)
    plus = tmp_path / 'a+b.yaml'
    plus.write_text(SGD.read_text())
    assert loaded(plus)[0].name == 'SGD'
    with pytest.raises(RecipeError, match=r"^recipe 'gma\.yaml' does not exist"):
        loaded(f'{SGD}+gma.yaml')


@pytest.mark.parametrize(
    ('change', 'lines'),
    [
        ('optimizer.lr=null', ["optimizer.lr=null: removed; SGD's default 0.001 is used"]),
        ('model.hidden=null', ["model.hidden=null: removed; mlp's default [256, 256] is used"]),
        ('data.drop_last=null', ["data.drop_last=null: removed; digits's default true is used"]),
        ('eval_interval=null', ['eval_interval=null: removed; the default 1 is used']),
        ('algorithms.sam=null', ['algorithms.sam=null: removed']),
        ('algorithms.sam.rho=null', ["algorithms.sam.rho=null: removed; SAM's default 0.05 is used"]),
        ('device=null', []),  # null is its value
        ('load_path=null', []),
    ],
)
def test_a_null_says_what_is_used_instead(change: str, lines: list[str]) -> None:
    assert loaded(SAM, change)[1] == lines


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        (
            'optimizer.lr=',
            r'^optimizer\.lr: has no value on the command line; give one, or write opt',
        ),
        ('seed= ', r'^seed: has no value'),
        ('optimizer.lrr=null', r'^optimizer\.lrr: unknown key \(value None\); did you mean lr\?$'),
        ('sede=null', r'^sede: unknown key \(value None\); did you mean seed'),
    ],
)
def test_an_empty_value_or_a_null_for_nothing_is_a_mistake(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        loaded(SGD, override)


def test_another_component_drops_what_it_does_not_have() -> None:
    recipe, lines = loaded(SGD, 'optimizer.name=adamw')
    assert recipe.optimizer == {'name': 'adamw', 'lr': 0.1, 'weight_decay': 0.0}
    assert lines == ['optimizer.name=adamw in place of sgd: dropped momentum; kept lr=0.1, weight_decay=0.0']
    recipe, lines = loaded(SGD, 'model.name=resnet18', 'data.name=cifar10')
    assert recipe.model.model_dump() == {'name': 'resnet18'}
    assert [line.partition(';')[0] for line in lines] == [
        'data.name=cifar10 in place of digits: dropped test_fraction, split_seed',
        'model.name=resnet18 in place of mlp: dropped hidden',
    ]
    recipe, lines = loaded(SGD, 'scheduler={name: linear, t_max: 0.5dur}')
    assert (recipe.scheduler['t_max'], recipe.scheduler['alpha_f']) == ('0.5dur', 0.0)


def test_an_overlay_with_another_component_drops_too(tmp_path: Path) -> None:
    overlay = tmp_path / 'adam.yaml'
    overlay.write_text('name: Adam\noptimizer: {name: adam, lr: 0.001}')
    recipe, lines = loaded(SGD, overlay)
    assert recipe.optimizer == {'name': 'adam', 'lr': 0.001, 'weight_decay': 0.0}
    assert lines[0] == 'optimizer.name=adam in place of sgd: dropped momentum; kept weight_decay=0.0'


@pytest.mark.parametrize(
    'changes',
    [
        ('optimizer.name=adamw', 'optimizer.momentum=0.9'),
        ('model.name=resnet18', 'model.hidden=[3]'),
        ('data.name=cifar10', 'data.test_fraction=0.1'),
    ],
)
def test_what_is_given_with_the_new_name_must_be_known(changes: tuple[str, str]) -> None:
    with pytest.raises(RecipeError, match=rf'^{changes[1].partition("=")[0]}: unknown key'):
        loaded(SGD, *changes)


def test_a_recipe_that_does_not_exist_suggests_the_nearest_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(YAMLS.parent)
    with pytest.raises(RecipeError) as caught:
        load_recipe('yamls/nowhere.yaml')
    assert str(caught.value).count('.yaml') == 4
    with pytest.raises(RecipeError, match=r"^recipe '.*sma\.yaml' does not exist; did you mean yamls/digits/sam"):
        load_recipe('yamls/digit/sma.yaml')


def test_a_name_that_changes_nothing_is_valid() -> None:
    check_recipe(loaded(SGD)[0])

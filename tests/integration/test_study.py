"""Studies: grids of runs, resumed after an interruption, and their tables."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from composer_sam.commands.main import main
from composer_sam.recipes import RecipeError, load_recipe
from composer_sam.studies.plan import StudyOptions, parse_grid, plan
from composer_sam.studies.result import RunResult
from composer_sam.studies.run import Curves, trained
from composer_sam.studies.sharpness import Sharpness
from composer_sam.studies.tables import tables

REPOSITORY = Path(__file__).parents[2]
YAMLS = REPOSITORY / 'yamls'
SGD, SAM = (str(YAMLS / 'digits' / f'{name}.yaml') for name in ('sgd', 'sam'))
QUICK = ['max_duration=2ep', '--samples', '32', '--jobs', '2']
GRID = ['--grid', 'algorithms.sam.rho=0.1,0.5']


def study(*arguments: str, out: Path) -> None:
    assert main(['study', *arguments, '--out', str(out)]) == 0


def runs(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (out / 'runs').glob('*.json')}


def outcome(found: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a run without its times."""
    sharpness = {key: value for key, value in found['sharpness'].items() if key != 'seconds'}
    return {key: value for key, value in found.items() if key not in ('seconds', 'sharpness')} | sharpness


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(['study', *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ''
    assert captured.err.count('\n') == 1
    return captured.err


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two recipes, one of them at two values, with two seeds."""
    out = tmp_path_factory.mktemp('study')
    study(SGD, SAM, *GRID, '--seeds', '2', *QUICK, out=out)
    return out


def test_every_run_is_a_file_with_all_about_it(finished: Path) -> None:
    found = runs(finished)
    assert sorted(found) == sorted(
        f'{point}_seed={seed}' for point in ('SGD', 'SAM_rho=0.1', 'SAM_rho=0.5') for seed in (17, 18)
    )
    for name, run in found.items():
        assert run['name'] == name
        assert run['steps'] == 42
        assert run['config']['max_duration'] == '2ep'
        assert run['config'].get('algorithms', {}).get('sam', {}).get('rho') == run['values'].get('algorithms.sam.rho')
        assert run['sharpness']['samples'] == 32
        assert run['sharpness']['top_eigenvalue'] > 0
        assert run['versions']['torch']
        assert (run['geometry'] is None) == (run['recipe'] == 'SGD')
    assert found['SAM_rho=0.1_seed=17']['geometry']['epoch'] == [1, 2]
    assert len({run['test_loss'] for run in found.values()}) == 6
    assert not list((finished / 'checkpoints').iterdir())


def test_tables_are_means_over_the_seeds(finished: Path) -> None:
    found = runs(finished)
    shown = {
        title: (headings, rows)
        for title, headings, rows in tables([RunResult.from_json(run) for run in found.values()])
    }
    headings, rows = shown['Test accuracy (%)']
    assert headings == ['', '-', 'rho 0.1', 'rho 0.5']
    cells = {row[0]: row[1:] for row in rows}
    for row, column, point in (('SGD', 0, 'SGD'), ('SAM', 1, 'SAM_rho=0.1'), ('SAM', 2, 'SAM_rho=0.5')):
        values = [100 * found[f'{point}_seed={seed}']['accuracy'] for seed in (17, 18)]
        assert cells[row][column] == f'{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}'
    assert cells['SAM'][0] == cells['SGD'][1] == ''
    assert [title for title in shown if 'eigenvalue' in title or 'Trace' in title or 'SAM sharpness' in title]
    markdown = (finished / 'tables.md').read_text()
    assert f'| SGD | {cells["SGD"][0]} |  |  |' in markdown
    assert 'sharpness on 32 training samples' in markdown
    assert len(json.loads((finished / 'results.json').read_text())['runs']) == 6
    assert (finished / 'study.png').read_bytes().startswith(b'\x89PNG')


def test_only_what_is_missing_is_trained_and_comes_out_the_same(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / 'runs').iterdir()}
    removed = finished / 'runs' / 'SAM_rho=0.5_seed=18.json'
    was = outcome(json.loads(removed.read_text()))
    removed.unlink()
    study(SGD, SAM, *GRID, '--seeds', '2', *QUICK, out=finished)
    after = {path: path.stat().st_mtime_ns for path in (finished / 'runs').iterdir()}
    assert [path for path in before if before[path] != after[path]] == [removed]
    again = json.loads(removed.read_text())
    assert outcome(again) == was


def test_nothing_is_trained_twice(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr('composer_sam.studies.kept.train_all', lambda *_: pytest.fail('a run was trained again'))
    study(SGD, SAM, *GRID, '--seeds', '2', *QUICK, out=finished)
    assert 'nothing was left to train: all 6 runs are done' in capsys.readouterr().err


def test_a_grid_over_names_has_what_each_of_them_takes() -> None:
    lines: list[str] = []
    gam = f'{SGD}+{YAMLS}/methods/gam.yaml'
    planned = plan(StudyOptions([gam], grids=['optimizer.name=sgd,adamw']), lines.append)
    assert [(run.name, run.recipe.name) for run in planned] == [
        ('GAM_name=sgd_seed=17', 'GAM'),
        ('GAM_name=adamw_seed=17', 'GAM'),
    ]
    assert [sorted(run.recipe.optimizer) for run in planned] == [
        ['lr', 'momentum', 'name', 'weight_decay'],
        ['lr', 'name', 'weight_decay'],
    ]
    dropped = 'optimizer.name=adamw in place of sgd: dropped momentum; kept lr=0.1, weight_decay=0.0'
    assert set(lines) == {'gam.yaml over sgd.yaml: replaced name; added algorithms.gam', dropped}


def test_runs_with_another_configuration_are_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = complaint(capsys, SGD, '--out', str(finished), *QUICK, 'optimizer.lr=0.2')
    assert 'runs/SGD_seed=17.json is of a run with optimizer.lr=0.1, and 0.2 is asked for; choose another' in message
    message = complaint(capsys, SGD, '--out', str(finished), 'max_duration=2ep', '--samples', '64')
    assert 'sharpness.samples=32, and 64' in message


def test_a_killed_study_goes_on_and_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    arguments = [SAM, 'max_duration=12ep', 'save_interval=1ep', '--seeds', '2', '--samples', '32', '--jobs', '2']
    study(*arguments, out=tmp_path / 'undisturbed')
    command = [sys.executable, '-m', 'composer_sam', 'study', *arguments, '--out', str(tmp_path / 'killed')]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get('PYTHONPATH')]))
    process = subprocess.Popen(command, env={**os.environ, 'PYTHONPATH': path}, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / 'killed' / 'checkpoints'
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob('*/ep*.pt')) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(checkpoints.glob('*/ep*.pt'))
    assert not runs(tmp_path / 'killed')
    with pytest.raises(
        RecipeError, match='killed/checkpoints/SAM_seed=1[78] is of a run with optimizer.lr=0.1, and 0.3'
    ):
        raise RecipeError(_refused([*arguments, 'optimizer.lr=0.3'], tmp_path / 'killed'))
    study(*arguments, out=tmp_path / 'killed')
    expected, resumed = (runs(tmp_path / name) for name in ('undisturbed', 'killed'))
    assert expected.keys() == resumed.keys() == {'SAM_seed=17', 'SAM_seed=18'}
    for name, run in expected.items():
        assert outcome(resumed[name]) == outcome(run)
        assert len(run['geometry']['share_larger']) == len(run['train']['loss']) == 12


def _refused(arguments: list[str], out: Path) -> str:
    from composer_sam.studies.study import study

    recipes, overrides = arguments[:1], [argument for argument in arguments if '=' in argument]
    with pytest.raises(RecipeError) as caught:
        study(StudyOptions(recipes, overrides, out=out, sharpness=Sharpness(32)))
    return str(caught.value)


def test_a_failed_run_leaves_the_others_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ['study', SGD, '--grid', 'optimizer.lr=0.1,1e30', 'callbacks.nan_monitor={}', '--no-sharpness', *QUICK]
    assert main([*arguments, '--out', str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert 'composer-sam: 1 of 2 runs failed: SGD_lr=1e+30_seed=17 failed: RuntimeError' in captured.err
    assert list(runs(tmp_path)) == ['SGD_lr=0.1_seed=17']
    assert 'lr 0.1' in captured.out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['max_duration=1ep'], 'study needs at least one recipe'),
        ([SGD, *GRID], '--grid algorithms.sam.rho: no recipe has it; algorithms is empty'),
        ([SAM, '--grid', 'algorithms.gam.rho=1'], 'no recipe has it; there is algorithms.sam'),
        ([SAM, '--grid', 'algorithms.sam.roh=1'], 'algorithms.sam.roh: unknown key (value 1); did you mean rho'),
        ([SAM, '--grid', 'algorithms.sam.rho=0.1,-1'], 'algorithms.sam: rho must be'),
        ([SAM, '--grid', 'algorithms.sam.rho='], 'a value is empty'),
        ([SAM, '--grid', 'algorithms.sam.rho=0.1,,0.2'], 'a value is empty'),
        ([SAM, '--grid', 'rho'], 'is not of the form dotted.key=value,value'),
        ([SAM, '--grid', 'seed=1,2'], 'seed cannot be in a grid; use --seeds'),
        ([SAM, *GRID, *GRID], 'is given twice'),
        ([SAM, '--grid', 'algorithms.sam.rho=0.1,0.10'], "two runs are called 'SAM_rho=0.1_seed=17'"),
        ([SGD, SGD], "two runs are called 'SGD_seed=17'"),
        ([SGD, 'save_folder=runs'], 'save_folder: '),
        ([SGD, 'grid={algorithms.sam.rho: [1]}'], 'the recipe does not have algorithms.sam.rho'),
        ([SGD, 'grid={optimizer.lr: []}'], 'grid: got'),
        ([SGD, '--out', '/proc/self/out'], "--out: '/proc/self/out' cannot be written"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in complaint(capsys, *arguments)


def test_the_number_of_seeds_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['study', SGD, '--seeds', '0']) == 2
    assert "--seeds: must be an integer >= 1, got '0'" in capsys.readouterr().err


def test_commas_in_brackets_belong_to_a_value() -> None:
    assert parse_grid('model.hidden=[8, 8],[16]') == ('model.hidden', [[8, 8], [16]])
    assert parse_grid('algorithms.sam.adaptive=true,false') == ('algorithms.sam.adaptive', [True, False])


def test_the_published_study_is_one_command() -> None:
    planned = plan(StudyOptions([str(path) for path in sorted((YAMLS / 'study').glob('*.yaml'))]))
    points = {(run.recipe.name, *run.values.values()) for run in planned}
    assert len(planned) == len(points) == 1 + 5 * 3 + 3
    assert {point for point in points if point[0] in ('study-sgd', 'study-sam')} == {
        ('study-sgd',), *(('study-sam', rho) for rho in (0.1, 0.2, 0.4))
    }  # fmt: skip
    assert {point[1] for point in points if point[0] == 'study-sgd-hess'} == {0.05, 1.0, 2.0}
    assert all(
        run.config['max_duration'] == '200ep' and run.config['model']['name'] == 'cifar_resnet18' for run in planned
    )


@pytest.mark.parametrize('folder', ['digits', 'cifar10'])
def test_a_small_study_has_every_method(folder: str) -> None:
    paths = [str(path) for path in sorted((YAMLS / 'study' / folder).glob('*.yaml'))]
    recipes = [load_recipe(path) for path in paths]
    assert len(recipes) == len({recipe.name for recipe in recipes}) == 7
    with_grid = {recipe.name for recipe in recipes if recipe.grid}
    assert with_grid == ({recipe.name for recipe in recipes} - {'SGD'} if folder == 'digits' else set())


def test_train_says_that_a_grid_is_for_a_study(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(YAMLS / 'study' / 'digits' / 'sam.yaml')
    assert main(['train', recipe, 'max_duration=1ba', 'trainer.progress_bar=false']) == 0
    assert 'is trained once, without its grid; composer-sam study trains the grid' in capsys.readouterr().err


def test_methods_of_one_pass_are_studied_without_the_gradient_that_they_do_not_take(tmp_path: Path) -> None:
    recipe = f'{SGD}+{YAMLS}/methods/msam.yaml'
    study(recipe, 'max_duration=1ep', '--no-sharpness', '--jobs', '1', out=tmp_path)
    (found,) = runs(tmp_path).values()
    assert found['recipe'] == 'MSAM' and found['geometry'] is None


def test_a_run_that_was_killed_while_it_was_measured_has_the_curves_of_all_its_steps(tmp_path: Path) -> None:
    """Its newest checkpoint is of the last step, in the middle of an epoch."""
    overrides = ['max_duration=30ba', 'save_interval=30ba', 'autoresume=true', f'save_folder={tmp_path}']
    recipe = load_recipe(SGD, (), overrides)
    first, again = Curves(), Curves()
    trained(recipe, first, [])
    trained(recipe, again, [])
    assert first.train == again.train
    assert len(first.train['epoch']) == 2

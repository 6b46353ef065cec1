"""The commands ``composer-sam landscape`` and ``composer-sam sharpness``."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from composer_sam.commands.main import main
from composer_sam.diagnostics import Objective, measure
from composer_sam.landscapes.grid import one_thread
from composer_sam.landscapes.storage import Landscape
from composer_sam.recipes import load_recipe
from composer_sam.studies.checkpoints import CheckpointError, default_labels, load_weights
from composer_sam.studies.problem import build_problem

REPOSITORY = Path(__file__).parents[2]
SGD, SAM = (str(REPOSITORY / 'yamls' / 'digits' / f'{name}.yaml') for name in ('sgd', 'sam'))
SMALL = ['model.hidden=[12]']
QUICK = ['--samples', '64', '--resolution', '3']


@pytest.fixture(scope='module')
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of three small networks after an epoch: sgd, sam, and sgd from another seed."""
    folder = tmp_path_factory.mktemp('runs')
    for name, recipe, seed in (('sgd', SGD, 17), ('sam', SAM, 17), ('other', SGD, 18)):
        arguments = [f'save_folder={folder / name}', 'max_duration=1ep', 'trainer.progress_bar=false', f'seed={seed}']
        assert main(['train', recipe, *SMALL, *arguments]) == 0
    return folder


def checkpoint(runs: Path, name: str) -> str:
    return str(runs / name / 'ep1-ba21-rank0.pt')


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ''
    assert captured.err.count('\n') == 1, captured.err
    return captured.err


def test_a_plane_around_two_checkpoints(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = [checkpoint(runs, name) for name in ('sgd', 'sam')]
    command = [
        'landscape',
        *checkpoints,
        '--recipe',
        SGD,
        *SMALL,
        *QUICK,
        '--labels',
        'SGD,SAM ρ 0.5',
    ]
    assert main([*command, '--out', str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert [line.split()[0] for line in output.splitlines()[1:3]] == ['SGD', 'SAM']
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *('SAM_ρ_0.5.npz', 'SGD.npz', 'landscape.html', 'landscape.png', 'surface.png')
    ]
    for name in ('landscape.png', 'surface.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
    problem = build_problem(load_recipe(SGD, (), SMALL), 'train', 64)
    for path, name in zip(checkpoints, ('SGD', 'SAM_ρ_0.5'), strict=True):
        load_weights(problem.model, Path(path))
        with one_thread():
            plain = Objective(problem.model, None, problem.batches).value()
        landscape = Landscape.load(tmp_path / f'{name}.npz')
        assert landscape.loss.shape == (3, 3)
        assert landscape.loss[1, 1] == plain == landscape.marks[0].loss
        assert f'{plain:.4g}' in output
    # Again: nothing is computed anew, and the pictures are drawn again.
    (tmp_path / 'landscape.png').unlink()
    before = (tmp_path / 'SGD.npz').read_bytes()
    assert main([*command, '--out', str(tmp_path)]) == 0
    assert (tmp_path / 'landscape.png').exists()
    assert (tmp_path / 'SGD.npz').read_bytes() == before
    # Something else is not laid over it.
    capsys.readouterr()
    assert main([*command, '--out', str(tmp_path), '--seed', '1']) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'holds a landscape with another seed (0, now 1); choose another folder or delete that file' in message
    assert (tmp_path / 'SGD.npz').read_bytes() == before


def test_a_curve_along_the_top_eigenvector(runs: Path, tmp_path: Path) -> None:
    command = ['landscape', checkpoint(runs, 'sgd'), '--recipe', SGD, *SMALL, '--directions', 'hessian', '--dims', '1']
    assert main([*command, '--out', str(tmp_path), '--resolution', '3', '--range', '0.02', '--samples', '64']) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ['curve.png', 'ep1-ba21-rank0.npz', 'landscape.html']
    landscape = Landscape.load(tmp_path / 'ep1-ba21-rank0.npz')
    assert landscape.axes == ('Hessian eigenvector (L2 distance)',)
    assert landscape.coordinates[0].tolist() == [-0.02, 0.0, 0.02]
    left, centre, right = landscape.loss
    assert left + right > 2 * centre  # it curves upwards


def test_a_line_and_a_plane_through_checkpoints(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ('sgd', 'sam', 'other')
    for dims in (1, 2):
        out = tmp_path / str(dims)
        checkpoints = [checkpoint(runs, name) for name in names[: dims + 1]]
        command = ['landscape', *checkpoints, '--recipe', SGD, *SMALL, *QUICK, '--directions', 'checkpoints']
        assert main([*command, '--dims', str(dims), '--out', str(out), '--split', 'test']) == 0
        (path,) = out.glob('*.npz')
        landscape = Landscape.load(path)
        assert [mark.label for mark in landscape.marks] == list(names[: dims + 1])
        problem = build_problem(load_recipe(SGD, (), SMALL), 'test', 64)
        for mark, name in zip(landscape.marks, names, strict=False):
            load_weights(problem.model, Path(checkpoint(runs, name)))
            with one_thread():
                assert Objective(problem.model, None, problem.batches).value() == mark.loss
    assert capsys.readouterr().out.count('other') == 1
    assert 'through sgd, sam and other' in (tmp_path / '2' / 'landscape.html').read_text(encoding='utf-8')


def test_sharpness_is_what_measure_says(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = [checkpoint(runs, name) for name in ('sgd', 'sam')]
    out = tmp_path / 'new' / 'sharpness.json'
    command = ['sharpness', *checkpoints, '--recipe', SGD, *SMALL, '--samples', '64', '--k', '2', '--rho', '0.1']
    assert main([*command, '--out', str(out)]) == 0
    output = capsys.readouterr().out.splitlines()
    headings = ['checkpoint', 'loss', 'accuracy', 'λ1', 'λ2', 'trace', 'sharpness', 'adaptive', 'flatness']
    assert output[0].split() == headings
    assert [line.split()[0] for line in output[1:3]] == ['sgd', 'sam']
    problem = build_problem(load_recipe(SGD, (), SMALL), 'train', 64)
    for row, path in zip(json.loads(out.read_text()), checkpoints, strict=True):
        load_weights(problem.model, Path(path))
        expected: dict[str, Any] = measure(problem.model, None, problem.batches, k=2, rho=0.1).as_dict()
        for name in ('loss', 'top_eigenvalue', 'eigenvalue_2', 'trace', 'trace_stderr', 'sam_sharpness'):
            assert row[name] == pytest.approx(expected[name], rel=1e-3), name
        with torch.no_grad():
            (images, labels) = problem.batches[0]
            right = problem.model.eval()((images, labels)).argmax(1) == labels
        assert row['accuracy'] == float(right.float().mean())
        assert row['checkpoint'] == path and row['samples'] == 64


def test_a_state_dict_loads_like_the_checkpoint_it_was_taken_from(runs: Path, tmp_path: Path) -> None:
    recipe = load_recipe(SGD, (), SMALL)
    model = build_problem(recipe, 'train', 1).model
    load_weights(model, Path(checkpoint(runs, 'sgd')))
    network = model.get_submodule('module')
    for name, source in (('whole', model), ('network', network)):
        path = tmp_path / f'{name}.pt'
        torch.save(source.state_dict(), path)
        other = build_problem(recipe, 'train', 1).model
        load_weights(other, path)
        assert all(torch.equal(p, q) for p, q in zip(other.parameters(), model.parameters(), strict=True))


def test_samples_are_a_fixed_mixture_of_right_and_wrong_labels() -> None:
    recipe = load_recipe(SGD)
    (images, labels), *rest = build_problem(recipe, 'train', 512).batches
    assert rest == [] and len(images) == 512
    again = build_problem(recipe.model_copy(update={'seed': 3}), 'train', 512).batches[0]
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    clean = recipe.model_copy(update={'data': recipe.data.model_copy(update={'label_noise': 0.0})})
    wrong = (build_problem(clean, 'train', 512).batches[0][1] != labels).float().mean()
    assert 0.3 < wrong < 0.5
    assert len(build_problem(recipe, 'test', 10**6).batches[0][0]) == 450


def test_labels_tell_checkpoints_apart() -> None:
    assert default_labels([Path('a/x.pt'), Path('a/y.pt')]) == ['x', 'y']
    assert default_labels([Path('a/x.pt'), Path('b/x.pt')]) == ['a', 'b']
    assert default_labels([Path('a/x.pt'), Path('a/y.pt'), Path('b/x.pt')]) == ['a-x', 'a-y', 'b-x']
    with pytest.raises(CheckpointError, match='name them with --labels A,B'):
        default_labels([Path('a/x.pt'), Path('a/x.pt')])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere.pt'], "checkpoint 'nowhere.pt' does not exist"),
        (['RUNS/sgd'], 'sgd is a folder, a checkpoint is one file'),
        (['max_duration=1ep'], 'no checkpoint is given'),
        (['SGD', 'SAM', '--labels', 'A'], "--labels: 2 different names are needed, by commas, got 'A'"),
        (['SGD', 'SAM', '--labels', 'A,A'], '--labels: 2 different names'),
        (['SGD', 'SGD'], 'the checkpoints cannot be told apart'),
        (['SGD', '--resolution', '1'], '--resolution must be >= 2, got 1'),
        (['SGD', '--resolution', '0'], '--resolution must be >= 2, got 0'),
        (['SGD', '--range', '0'], '--range must be a number > 0, got 0.0'),
        (['SGD', '--range', 'nan'], '--range must be a number > 0, got nan'),
        (['SGD', '--range', 'inf'], '--range must be a number > 0, got inf'),
        (['SGD', '--directions', 'checkpoints'], '--directions checkpoints --dims 2 needs 3 checkpoints, got 1'),
        (['SGD', 'SAM', '--directions', 'checkpoints'], 'needs 3 checkpoints, got 2'),
        (['SGD', '--directions', 'checkpoints', '--dims', '1'], '--dims 1 needs 2 checkpoints, got 1'),
        (['SGD', 'model.name=nothing'], "model.name: unknown name (value 'nothing')"),
        (['SGD', '--out', '/proc/self/out'], "--out: '/proc/self/out' cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {'SGD': checkpoint(runs, 'sgd'), 'SAM': checkpoint(runs, 'sam'), 'RUNS/sgd': str(runs / 'sgd')}
    arguments = [named.get(argument, argument) for argument in arguments]
    out = tmp_path / 'out'
    capsys.readouterr()
    assert main(['landscape', '--recipe', SGD, '--out', str(out), *arguments]) == 2
    assert message in one_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['landscape', 'x.pt', '--recipe', SGD], 'required: --out'),
        (['landscape', SGD, '--out', 'x'], 'there is no '),
        (['landscape', 'x.pt', '--recipe', SGD, '--out', 'x', '--split', 'val'], "invalid choice: 'val'"),
        (['landscape', 'x.pt', '--recipe', SGD, '--out', 'x', '--dims', '3'], 'invalid choice: 3'),
        (['landscape', 'x.pt', '--recipe', SGD, '--out', 'x', '--samples', '0'], "must be an integer >= 1, got '0'"),
        (['landscape', 'x.pt', '--recipe', SGD, '--out', 'x', '--seed', '-1'], 'must be an integer >= 0'),
        (['landscape', 'x.pt', '--recipe', SGD, '--out', 'x', '--jobs', '0'], "must be an integer >= 1, got '0'"),
        (['sharpness', '--recipe', SGD], 'required: CHECKPOINT|key=value'),
        (['sharpness', 'x.pt', '--recipe', SGD, '--k', '0'], "must be an integer >= 1, got '0'"),
        (['sharpness', 'x.pt', '--recipe', SGD, '--rho', '0'], '--rho must be a number > 0, got 0.0'),
        (['sharpness', 'x.pt', '--recipe', SGD], "checkpoint 'x.pt' does not exist"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_model_names_the_keys_and_its_own_recipe(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    for hidden, complaint in (
        (
            '[13]',
            'of another shape: module.1.weight (12, 64) instead of (13, 64), module.1.bias (12,) instead of (13,)',
        ),
        ('[12,12]', 'missing: module.5.weight, module.5.bias; of another shape: module.3.weight (10, 12) instead'),
        ('[]', 'unexpected: module.3.weight, module.3.bias; of another shape: module.1.weight (12, 64) instead of'),
    ):
        command = ['landscape', checkpoint(runs, 'sgd'), '--recipe', SGD, f'model.hidden={hidden}', *QUICK]
        assert main([*command, '--out', str(tmp_path / 'out')]) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert complaint in message
        assert message.endswith(f'Give --recipe {runs / "sgd" / "config.yaml"}')


def test_the_recipe_beside_a_checkpoint_serves(runs: Path, tmp_path: Path) -> None:
    config = str(runs / 'sam' / 'config.yaml')
    assert main(['landscape', checkpoint(runs, 'sam'), '--recipe', config, *QUICK, '--out', str(tmp_path)]) == 0


class Hostile:
    """An object that executes a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ('executed',)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ({'weights': [1, 2]}, 'holds no weights: it is neither a checkpoint'),
        ({'state': {'model': {}}}, 'holds no weights'),
        ({}, 'holds no weights'),
        (Hostile(), 'which would have to be executed to be loaded'),
        (b'nonsense', 'is no checkpoint'),
        (b'', 'is no checkpoint'),
    ],
)
def test_a_file_that_is_no_checkpoint_is_an_error_and_nothing_is_executed(
    content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'file.pt'
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_weights(torch.nn.Linear(1, 1), path)
    assert not (tmp_path / 'executed').exists()


def test_hostile_bytes_would_execute() -> None:
    assert b'mkdir' in pickle.dumps(Hostile())


def test_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv('WORLD_SIZE', '2')
    for command in (['landscape', 'x.pt', '--recipe', SGD, '--out', 'x'], ['sharpness', 'x.pt', '--recipe', SGD]):
        assert main(command) == 2
        assert re.search('(landscape|sharpness) starts its own processes', capsys.readouterr().err)


def test_weights_that_overflow_are_drawn_with_gaps(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    command = ['landscape', checkpoint(runs, 'sgd'), '--recipe', SGD, *SMALL, *QUICK, '--range', '1e25']
    assert main([*command, '--out', str(tmp_path)]) == 0
    landscape = Landscape.load(tmp_path / 'ep1-ba21-rank0.npz')
    assert np.isfinite(landscape.loss).sum() < 9 and np.isfinite(landscape.loss[1, 1])
    assert ' of 9' in capsys.readouterr().out

"""Recipes that come with the package, by name: wherever a file is taken, and after the user's own files."""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import composer_sam.commands.recipes
import composer_sam.studies.compare
from composer_sam import shipped
from composer_sam.commands.main import main
from composer_sam.commands.terminal import files_and_overrides
from composer_sam.recipes import RecipeError, as_yaml, load_recipe
from composer_sam.studies.plan import StudyOptions, plan
from composer_sam.studies.survival.plan import SurvivalOptions, plan_survival

YAMLS = Path(__file__).parents[2] / 'yamls'
NAMES = list(shipped.recipes())
ON_CPU = ['device=cpu', 'precision=fp32']


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one: there is no clone here."""
    folder = tmp_path / 'elsewhere'
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def told(*files: str) -> tuple[str, list[str]]:
    """The recipe as it is saved beside checkpoints, and what loading it says."""
    lines: list[str] = []
    return as_yaml(load_recipe(files[0], files[1:], ON_CPU, lines.append)), lines


def test_there_are_names_for_all_files() -> None:
    files = {path.relative_to(YAMLS).with_suffix('').as_posix() for path in YAMLS.rglob('*.yaml')}
    assert set(NAMES) == files and len(files) > 50


@pytest.mark.parametrize('name', ['digits/sam', 'study/digits/sgd', 'lm/sam_last'])
def test_a_name_is_its_file(name: str) -> None:
    expected = told(str(YAMLS / f'{name}.yaml'))
    for spelled in (name, f'{name}.yaml', f'yamls/{name}', f'yamls/{name}.yaml'):
        assert told(spelled) == expected


def test_overlays_have_names_too() -> None:
    expected, _ = told(str(YAMLS / 'digits' / 'sgd.yaml'), str(YAMLS / 'methods' / 'gam.yaml'))
    for files in (('digits/sgd', 'methods/gam'), ('digits/sgd+methods/gam',), ('digits/sgd+yamls/methods/gam.yaml',)):
        recipe, lines = told(*files)
        assert recipe == expected and load_recipe(*files[:1], files[1:]).name == 'GAM'
        assert [line.replace('.yaml', '') for line in lines] == [
            'gam over sgd: replaced name; added algorithms.gam',
        ]
    write('longer.yaml', 'max_duration: 99ep')
    recipe = load_recipe('digits/sgd+methods/gam+longer')
    assert (recipe.name, recipe.max_duration) == ('GAM+longer', '99ep')


def test_nothing_depends_on_where_the_package_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [('digits/sam',), ('digits/sam+methods/sam',), ('study/sgd', 'methods/gam')]
    here = [told(*one) for one in files]
    shutil.copytree(YAMLS, tmp_path / 'site-packages' / 'composer_sam' / 'yamls')
    monkeypatch.setattr(shipped, '_FOLDERS', (tmp_path / 'site-packages' / 'composer_sam' / 'yamls',))
    there = [told(*one) for one in files]
    assert there == here
    assert all(str(tmp_path) not in text for text, _ in there)


@pytest.mark.parametrize('spelled', ['digits/sgd', 'digits/sgd.yaml'])
@pytest.mark.parametrize('file', ['digits/sgd', 'digits/sgd.yaml'])
def test_a_file_of_the_user_comes_before_a_name(file: str, spelled: str) -> None:
    write(file, (YAMLS / 'digits' / 'sgd.yaml').read_text().replace('name: SGD', 'name: mine'))
    if not (file == 'digits/sgd' and spelled == 'digits/sgd.yaml'):  # a path that is not there is not this file
        assert load_recipe(spelled).name == 'mine'
    assert load_recipe('yamls/digits/sgd').name == load_recipe('study/digits/sgd').name == 'SGD'
    assert load_recipe('digits/sam').name == 'SAM'  # its base is the one it comes with
    assert load_recipe('digits/sam').max_duration == '60ep'


def test_a_folder_is_no_recipe() -> None:
    """As after training with save_folder=digits/sgd, and compare --out digits/sgd+methods/gam."""
    Path('digits/sgd').mkdir(parents=True)
    Path('digits/sgd+methods/gam').mkdir(parents=True)
    assert load_recipe('digits/sgd').name == 'SGD'
    assert load_recipe('digits/sgd+methods/gam').name == 'GAM'


def test_a_path_that_says_where_it_is_is_no_name() -> None:
    with pytest.raises(RecipeError, match=r"^recipe '\./digits/sgd\.yaml' does not exist; did you mean .*digits/sgd"):
        load_recipe('./digits/sgd.yaml')
    with pytest.raises(RecipeError, match=r'does not exist'):
        load_recipe(Path.cwd() / 'digits' / 'sgd')


def test_a_base_is_a_file_beside_or_a_name() -> None:
    write('own/mine.yaml', 'base: digits/sgd\nname: mine\nmax_duration: 3ep')
    recipe = load_recipe('own/mine.yaml')
    assert (recipe.name, recipe.max_duration, recipe.seed) == ('mine', '3ep', 17)
    assert load_recipe('own/mine').name == 'mine'
    # Not what lies in the current folder, but what lies beside the file.
    sgd = (YAMLS / 'digits' / 'sgd.yaml').read_text()
    write('digits/sgd.yaml', sgd.replace('seed: 17', 'seed: 18'))
    assert load_recipe('own/mine.yaml').seed == 17
    write('own/digits/sgd.yaml', sgd.replace('seed: 17', 'seed: 19'))
    assert load_recipe('own/mine.yaml').seed == 19


def test_a_file_can_be_based_on_the_recipe_of_its_own_name() -> None:
    write('digits/sgd.yaml', 'base: digits/sgd\nmax_duration: 3ep')
    recipe = load_recipe('digits/sgd')
    assert (recipe.name, recipe.max_duration) == ('SGD+sgd', '3ep')
    write('round.yaml', 'base: round')
    with pytest.raises(RecipeError, match=r'^round\.yaml: base leads back to itself'):
        load_recipe('round.yaml')


def test_an_unknown_base_is_answered_with_names() -> None:
    write('mine.yaml', 'base: digits/sgdd\nname: mine')
    with pytest.raises(RecipeError, match=r"^recipe 'digits/sgdd' does not exist; did you mean digits/sgd or "):
        load_recipe('mine.yaml')
    write('own/mine.yaml', 'base: digits/sgdd.yaml\nname: mine')
    with pytest.raises(
        RecipeError, match=r"^recipe 'own/digits/sgdd\.yaml' does not exist; did you mean digits/sgd\.y"
    ):
        load_recipe('own/mine.yaml')


@pytest.mark.parametrize(
    'arguments',
    [
        ['train', 'digits/sma'],
        ['train', 'digits/sgd', 'digits/sma'],
        ['train', 'digits/sgd+digits/sma'],
        ['compare', 'digits/sgd', 'digits/sma'],
        ['study', 'digits/sma'],
        ['survive', 'digits/sma'],
        ['survive', 'lm/adamw', '--finetune', 'digits/sma'],
        ['sharpness', 'latest.pt', '--recipe', 'digits/sma'],
        ['landscape', 'latest.pt', '--recipe', 'digits/sma', '--out', 'pictures'],
        ['recipes', 'copy', 'digits/sma'],
    ],
    ids=' '.join,
)
def test_a_typo_in_a_name_is_one_line_that_names_the_nearest(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write('latest.pt', '')
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ''
    lines = [line for line in captured.err.splitlines() if not line.startswith('starting ')]
    assert len(lines) == 1
    assert "'digits/sma'" in lines[0] and '; did you mean digits/sam or ' in lines[0]
    assert [path.name for path in Path().iterdir()] == ['latest.pt']


def test_studies_take_names() -> None:
    runs = plan(StudyOptions(['study/digits/sam', 'digits/sgd'], ON_CPU, out=Path('out')))
    assert len(runs) == 6
    survival = SurvivalOptions(['lm/adamw', 'lm/adamw+methods/sam'], 'lm/finetune', ON_CPU, out=Path('out'))
    plans = plan_survival(survival, lambda line: None)
    assert [run.recipe.name for run in plans.trained] == ['AdamW', 'SAM'] and len(plans.finetuned) == 8


def test_a_pattern_stands_for_names_as_for_files() -> None:
    expected = [name for name in NAMES if name.startswith('study/digits/')]
    assert len(expected) == 7
    for pattern in ('study/digits/*', 'yamls/study/digits/*.yaml'):
        assert files_and_overrides([pattern, 'seed=3']) == (expected, ['seed=3'])
    assert files_and_overrides(['study/s*'])[0] == [
        name for name in NAMES if name.startswith('study/s') and name.count('/') == 1
    ]
    assert files_and_overrides(['nowhere/*', 'digits/sam']) == (['nowhere/*', 'digits/sam'], [])


# composer-sam recipes copy


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('name', NAMES)
def test_a_copy_is_the_recipe_with_its_comments(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = name.startswith('methods/')
    expected, _ = told('digits/sgd', name) if overlay else told(name)
    sgd = str(YAMLS / 'digits' / 'sgd.yaml')
    assert main(['recipes', 'copy', name, 'mine']) == 0
    line = capsys.readouterr().out
    file = f'mine/{name.rpartition("/")[2]}.yaml'
    assert line.startswith(f'wrote {file}') and line.count('\n') == 1
    assert line.endswith(f'run it: composer-sam train {"digits/sgd " * overlay}{file}\n')
    text, original = Path(file).read_text(), shipped.recipes()[name].read_text()
    assert len(text.splitlines()) == len(original.splitlines())
    assert text == original or 'base: ../' in original
    monkeypatch.setattr(shipped, '_FOLDERS', ())  # by itself
    assert (told(sgd, file) if overlay else told(file))[0] == expected


def test_a_copy_lies_in_the_current_folder_unless_another_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['recipes', 'copy', 'yamls/digits/sam.yaml']) == 0
    assert contents(Path()) == {
        f'{name}.yaml': (YAMLS / 'digits' / f'{name}.yaml').read_text() for name in ('sam', 'sgd')
    }
    assert capsys.readouterr().out == (
        'wrote sam.yaml and what it is based on, sgd.yaml; run it: composer-sam train sam.yaml\n'
    )


def test_a_base_of_the_same_file_name_gets_another() -> None:
    assert main(['recipes', 'copy', 'study/digits/sgd']) == 0
    assert contents(Path()).keys() == {'sgd.yaml', 'digits_sgd.yaml'}
    assert '\nbase: digits_sgd.yaml\n' in Path('sgd.yaml').read_text()


def test_a_copy_overwrites_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    copy = ['recipes', 'copy', 'digits/sam', 'mine']
    assert main(copy) == 0
    capsys.readouterr()
    assert main(copy) == 2
    assert "'mine/sam.yaml' exists; choose another folder" in capsys.readouterr().err
    write('mine/sam.yaml', 'name: of the user')
    before = contents(Path())
    assert main(copy) == 2
    assert contents(Path()) == before
    # Another recipe with the same base stands beside it; one whose base was changed does not.
    assert main(['recipes', 'copy', 'digits/sgd_early', 'mine']) == 0
    assert '; mine/sgd.yaml was there;' in capsys.readouterr().out
    Path('mine/sgd_early.yaml').unlink()
    write('mine/sgd.yaml', 'name: of the user')
    before = contents(Path())
    assert main(['recipes', 'copy', 'digits/sgd_early', 'mine']) == 2
    assert "'mine/sgd.yaml' exists and differs from the one that sgd_early.yaml is based on" in capsys.readouterr().err
    assert contents(Path()) == before


def test_a_copy_is_written_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original: Any = composer_sam.commands.recipes.write_whole

    def write_until_the_disk_is_full(path: Path, text: str) -> None:
        if path.name == 'sam.yaml':
            raise OSError(errno.ENOSPC, 'No space left on device', str(path))
        original(path, text)

    monkeypatch.setattr(composer_sam.commands.recipes, 'write_whole', write_until_the_disk_is_full)
    assert main(['recipes', 'copy', 'digits/sam']) == 1
    assert 'cannot be written: No space left on device' in capsys.readouterr().err
    assert contents(Path()) == {}


@pytest.mark.parametrize(
    ('folder', 'message'),
    [('mine.yaml', "a folder is needed, got 'mine.yaml'"), ('file', "'file' cannot be written: File exists")],
)
def test_a_copy_needs_a_folder(folder: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write('file', '')
    assert main(['recipes', 'copy', 'digits/sam', folder]) == 2
    assert message in capsys.readouterr().err
    assert contents(Path()).keys() == {'file'}


# composer-sam demo


def test_the_demo_compares_three_recipes_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[tuple[Any, ...]] = []
    monkeypatch.setattr(composer_sam.studies.compare, 'compare', lambda *arguments: called.append(arguments))
    write('digits/sam.yaml', 'a file of the user, which the demo leaves alone')
    files = [str(YAMLS / 'digits' / f'{name}.yaml') for name in ('sgd', 'sgd_early', 'sam')]
    assert main(['demo']) == 0
    assert called.pop() == (files, [], 3, Path('demo'), None, True, True)
    assert main(['demo', '--out', 'x', '--seeds', '1', '--jobs', '2', 'max_duration=2ep']) == 0
    assert called.pop() == (files, ['max_duration=2ep'], 1, Path('x'), 2, True, True)
    assert main(['demo', 'digits/sgd']) == 2
    assert 'demo takes no recipes, got digits/sgd' in capsys.readouterr().err and not called


def test_the_demo_names_the_extra_that_has_all_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, 'composer_sam.studies.compare', None)
    assert main(['demo']) == 2
    assert capsys.readouterr().err.endswith(": pip install 'composer-sam[all]'\n")

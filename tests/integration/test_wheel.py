"""The wheel and the archive of the sources, as a user without a clone meets them."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from composer_sam.version import __version__

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# Not what environments, caches and runs leave in a clone.
LEFT_OUT = ('.git', '.venv*', '.*_cache', '.hypothesis', '__pycache__', '*.egg-info', 'build', 'dist', 'demo', 'runs')
NEEDS = ('build', 'twine')
NO_INDEX = ('Could not find a version', 'No matching distribution', 'Temporary failure in name resolution')


@dataclass(frozen=True)
class Distributions:
    """What ``python -m build`` makes.

    Attributes:
        python: the interpreter of the environment with the tools.
        sources: the archive of the sources.
        wheel: the wheel, which is built from it.
    """

    python: Path
    sources: Path
    wheel: Path


def environment(folder: Path) -> Path:
    """A new virtual environment, which sees no other; its interpreter."""
    venv.create(folder, with_pip=True, symlinks=True)
    return folder / 'bin' / 'python'


def run(command: list[str | Path], cwd: Path, seconds: int = 900) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does who has no clone."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(('PYTHON', 'VIRTUAL_ENV'))}
    return subprocess.run(
        command, cwd=cwd, env={**clean, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=seconds
    )


def output(command: list[str | Path], cwd: Path) -> str:
    done = run(command, cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def made(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    folder = tmp_path_factory.mktemp('build')
    python = environment(folder / 'tools')
    installed = run([python, '-m', 'pip', 'install', '--quiet', *NEEDS], folder)
    if installed.returncode != 0 and any(text in installed.stderr for text in NO_INDEX):
        pytest.skip(f'there is no package index to install {" and ".join(NEEDS)} from')
    assert installed.returncode == 0, installed.stderr
    shutil.copytree(ROOT, folder / 'clone', ignore=shutil.ignore_patterns(*LEFT_OUT))
    output([python, '-m', 'build', '--outdir', folder / 'dist', folder / 'clone'], folder)
    (sources,) = (folder / 'dist').glob('*.tar.gz')
    (wheel,) = (folder / 'dist').glob('*.whl')
    return Distributions(python, sources, wheel)


@pytest.fixture(scope='module')
def installed(made: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of a new environment with the wheel.

    torch, Composer and all else are those of this environment, by its folders alone: what its own .pth files add, an
    editable installation of a clone among it, is not seen.
    """
    folder = tmp_path_factory.mktemp('installed') / 'environment'
    python = environment(folder)
    output([python, '-m', 'pip', 'install', '--quiet', '--no-deps', made.wheel], folder)
    (packages,) = folder.glob('lib/python*/site-packages')
    (packages / 'of_the_tests.pth').write_text('\n'.join(site.getsitepackages()))
    return folder / 'bin'


def test_names_of_the_distributions_and_what_twine_says(made: Distributions, tmp_path: Path) -> None:
    assert made.wheel.name == f'composer_sam-{__version__}-py3-none-any.whl'
    assert made.sources.name == f'composer_sam-{__version__}.tar.gz'
    checked = output(
        [made.python, '-m', 'twine', '--no-color', 'check', '--strict', made.wheel, made.sources], tmp_path
    )
    assert checked.count('PASSED') == 2


def test_the_wheel_holds_the_package_with_every_recipe_and_nothing_else(made: Distributions) -> None:
    names = {name for name in zipfile.ZipFile(made.wheel).namelist() if '.dist-info/' not in name}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'composer_sam').rglob('*.py')}
    recipes = {f'composer_sam/{path.relative_to(ROOT).as_posix()}' for path in (ROOT / 'yamls').rglob('*.yaml')}
    assert names == {*package, *recipes, 'composer_sam/py.typed'}


def test_the_archive_holds_what_the_readme_and_the_tests_need(made: Distributions) -> None:
    with tarfile.open(made.sources) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    # Documentation, tests and benchmarks read each other's files.
    for folder in ('benchmarks', 'composer_sam', 'docs', 'examples', 'tests', 'yamls'):
        files = [path for path in (ROOT / folder).rglob('*') if path.is_file()]
        expected = {
            path.relative_to(ROOT).as_posix() for path in files if path.suffix != '.pyc' and '.work' not in path.parts
        }
        assert expected <= names, expected - names
    tops = {'Makefile', 'README.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'LICENSE', 'pyproject.toml', 'setup.py'}
    assert tops | {'MANIFEST.in', '.ci/run', 'pyrightconfig.strict.json'} <= names
    assert not [name for name in names if name.endswith('.pyc') or '__pycache__' in name]


def test_a_user_without_a_clone(installed: Path, tmp_path: Path) -> None:
    """Every command is run in an empty folder."""
    program, python = installed / 'composer-sam', installed / 'python'
    found = output([python, '-c', 'import composer_sam; print(composer_sam.__file__)'], tmp_path).strip()
    assert Path(found).is_relative_to(installed.parent) and ROOT not in Path(found).parents
    assert output([program, '--version'], tmp_path) == f'composer-sam {__version__}\n'

    listed = output([program, 'recipes'], tmp_path)
    assert '\ndigits/sam  SAM\n    SAM on digits with wrong labels\n' in listed and '\nmethods/gsam  GSAM\n' in listed

    resolved = output([program, 'train', 'digits/sgd+methods/gam', '--dry-run'], tmp_path)
    assert resolved.startswith('name: GAM\n') and str(installed.parent) not in resolved

    output([program, 'recipes', 'copy', 'digits/sam', '.'], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['sam.yaml', 'sgd.yaml']
    trained = output([program, 'train', './sam.yaml', 'max_duration=1ep'], tmp_path)
    assert trained.startswith('SAM: test accuracy ') and 'after 21 steps' in trained
    assert sorted(path.name for path in tmp_path.iterdir()) == ['sam.yaml', 'sgd.yaml']


def test_the_demo_without_a_clone(installed: Path, tmp_path: Path) -> None:
    printed = output([installed / 'composer-sam', 'demo', '--seeds', '1', 'max_duration=2ep'], tmp_path)
    assert 'largest eigenvalue' in printed
    runs = json.loads((tmp_path / 'demo' / 'results.json').read_text())['runs']
    assert [run['recipe'] for run in runs] == ['SGD', 'SGD, stopped early', 'SAM']
    assert all(run['sharpness'] is not None and str(installed.parent) not in json.dumps(run['config']) for run in runs)
    files = {path.name for path in (tmp_path / 'demo').iterdir()}
    assert files >= {'comparison.png', 'landscape.png', 'landscape.html', 'surface.png', 'results.json'}

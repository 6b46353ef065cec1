"""What setup.py adds to a wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from composer_sam.version import __version__

ROOT = Path(__file__).parents[2]
# Without pyproject.toml, which this environment's setuptools may be too old to read, and without writing into ROOT.
BUILD = """
import sys
from setuptools import Distribution
from setup import BuildWithRecipes

build = BuildWithRecipes(Distribution({{'packages': ['composer_sam'], 'script_name': 'setup.py'}}))
build.build_lib, build.editable_mode = {folder!r}, {editable}
build.ensure_finalized()
build.run()
print(*build.get_outputs(include_bytecode=False), sep='\\n')
"""


@pytest.mark.parametrize('editable', [False, True])
def test_a_build_holds_every_recipe(tmp_path: Path, editable: bool) -> None:
    pytest.importorskip('setuptools')
    script = BUILD.format(folder=str(tmp_path), editable=editable)
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(tmp_path / 'composer_sam').as_posix() for path in tmp_path.rglob('*.yaml')}
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'yamls').rglob('*.yaml')}
    assert len(recipes) > 50
    assert built == (set() if editable else recipes)
    printed = {Path(line) for line in done.stdout.splitlines() if line.endswith('.yaml')}
    assert printed == {tmp_path / 'composer_sam' / recipe for recipe in built}
    for recipe in built:
        assert (tmp_path / 'composer_sam' / recipe).read_text() == (ROOT / recipe).read_text()


def test_the_version_is_in_the_changelog() -> None:
    assert f'\n## [{__version__}] - 20' in (ROOT / 'CHANGELOG.md').read_text()

"""``composer-sam recipes`` and ``composer-sam keys``."""

from __future__ import annotations

from pathlib import Path

import pytest

from composer_sam.commands.main import main
from composer_sam.recipes import load_recipe
from composer_sam.recipes.keys import all_keys
from composer_sam.recipes.schema import DATA, MODELS, Recipe

ROOT = Path(__file__).parents[2]


def test_every_shipped_recipe_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert main(['recipes']) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = dict(line.split('  ', 1) for line in lines[::2])
    assert listed.keys() == {str(path.relative_to(ROOT)) for path in (ROOT / 'yamls').rglob('*.yaml')}
    for path, name in listed.items():
        if not path.startswith('yamls/methods/'):
            assert name == load_recipe(path, overrides=['device=cpu', 'precision=fp32']).name
    assert all(line.startswith('    ') and len(line) > 10 for line in lines[1::2])
    index = lines.index('yamls/digits/sam.yaml  SAM')
    assert lines[index + 1] == '    SAM on digits with wrong labels'


def test_where_there_are_no_recipes_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(['recipes']) == 2
    assert 'there is no yamls/ with recipes in the current folder' in capsys.readouterr().err


def test_every_key_has_a_type_a_default_and_a_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['keys']) == 0
    printed = capsys.readouterr().out
    assert '  stop_at_nonfinite: integer >= 0, default 10\n      the number of steps in a row ' in printed
    assert '  precision: fp32 | amp_bf16 | amp_fp16 | amp_fp8, default fp32\n' in printed
    assert '  max_duration: string or integer > 0, required\n' in printed
    assert '  data.label_noise: number >= 0 and < 1, default 0.0\n' in printed
    assert '  model.hidden: list of integer > 0, default [256, 256]\n' in printed
    keys = [key for section in all_keys().values() for key in section]
    assert all(key.type and key.meaning and '`' not in key.meaning for key in keys)
    names = {key.name for key in keys}
    assert set(Recipe.model_fields) <= names
    for section, known in (('data', DATA), ('model', MODELS)):
        for cls in known.values():
            assert {f'{section}.{name}' for name in cls.model_fields if name != 'name'} <= names

"""``composer-sam recipes`` and ``composer-sam keys``."""

from __future__ import annotations

from pathlib import Path

import pytest

from composer_sam import shipped
from composer_sam.commands.main import main
from composer_sam.recipes import load_recipe
from composer_sam.recipes.keys import all_keys
from composer_sam.recipes.schema import DATA, MODELS, Recipe

ROOT = Path(__file__).parents[2]


def test_every_shipped_recipe_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(['recipes']) == 0
    recipes, overlays = (part.splitlines() for part in capsys.readouterr().out.split('\nOverlays'))
    assert 'composer-sam train NAME' in recipes[0] and 'composer-sam train RECIPE NAME' in overlays[0]
    lines = [*recipes[2:], *overlays[2:]]
    listed = dict(line.split('  ', 1) for line in lines[::2])
    files = (ROOT / 'yamls').rglob('*.yaml')
    assert listed.keys() == {path.relative_to(ROOT / 'yamls').with_suffix('').as_posix() for path in files}
    for name, run in listed.items():
        overlay = name.startswith('methods/')
        assert any(line.startswith(f'{name}  ') for line in (overlays if overlay else recipes))
        if not overlay:
            assert run == load_recipe(name, overrides=['device=cpu', 'precision=fp32']).name
    assert all(line.startswith('    ') and len(line) > 6 and 'as an overlay' not in line for line in lines[1::2])
    index = lines.index('digits/sam  SAM')
    assert lines[index + 1] == '    SAM on digits with wrong labels'
    assert lines[lines.index('methods/gsam  GSAM') + 1] == '    SAM guided by the surrogate gap'


def test_where_the_recipes_are_missing_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shipped, '_FOLDERS', ())
    for command in (['recipes'], ['recipes', 'copy', 'digits/sam'], ['demo']):
        assert main(command) == 2
        assert 'missing from this installation' in capsys.readouterr().err


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

"""A checkpoint of another language model is one line before training, however it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from composer_sam.commands.main import main
from tests.language import LM, TINY

pytest.importorskip('transformers')
SIZES = [
    (['model.config.n_embd=32'], 'model.transformer.wte.weight is [257, 16] there, and [257, 32] in the'),
    (['model.config.n_layer=3'], 'it does not have model.transformer.h.2.'),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / 'run'
    assert main(['train', str(LM / 'adamw.yaml'), *TINY, 'max_duration=2ba', f'save_folder={folder}']) == 0
    return folder


@pytest.fixture
def neox(tmp_path: Path) -> Path:
    """A recipe of another architecture, whose settings replace those of the first."""
    (tmp_path / 'none.yaml').write_text(f'base: {LM / "adamw.yaml"}\nmodel: {{config: null}}')
    recipe = tmp_path / 'neox.yaml'
    recipe.write_text(
        f'base: {tmp_path / "none.yaml"}\n'
        'model: {config: {architecture: gpt_neox, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2}}'
    )
    return recipe


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the last line of a training that is refused."""
    capsys.readouterr()
    assert main(['train', *arguments, 'max_duration=4ba']) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(('changes', 'message'), SIZES)
def test_other_sizes_by_load_path(
    run: Path, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, str(LM / 'adamw.yaml'), *TINY, f'load_path={run / "latest-rank0.pt"}', *changes)
    assert said.startswith('composer-sam: load_path: ')
    assert message in said


@pytest.mark.parametrize(('changes', 'message'), SIZES)
def test_other_sizes_by_autoresume(
    run: Path, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, str(LM / 'adamw.yaml'), *TINY, f'save_folder={run}', 'autoresume=true', *changes)
    assert said.startswith('composer-sam: save_folder: ')
    assert message in said


@pytest.mark.parametrize('weights_only', ['true', 'false'])
def test_another_architecture_by_load_path(
    run: Path, neox: Path, weights_only: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [one for one in TINY if 'model.config' not in one]
    loads = [f'load_path={run / "latest-rank0.pt"}', f'trainer.load_weights_only={weights_only}']
    said = refused(capsys, str(neox), *own, *loads)
    assert said.startswith('composer-sam: load_path: ')
    assert 'it does not have model.gpt_neox.' in said


def test_another_architecture_by_autoresume(run: Path, neox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [one for one in TINY if 'model.config' not in one]
    said = refused(capsys, str(neox), *own, f'save_folder={run}', 'autoresume=true')
    assert said.startswith('composer-sam: save_folder: ')
    assert 'it does not have model.gpt_neox.' in said

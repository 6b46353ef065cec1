"""Every command that a page shows does what it says, on a run of a few steps.

``make`` and ``pip`` are left out: what they call is tested, and the test of the wheel installs it and runs the demo.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from composer_sam.commands.main import main
from tests.language import TINY
from tests.pages import COMMANDS, ROOT, expanded

OURS = ('composer-sam', 'composer')
SHOWN = list(dict.fromkeys(page for page, words in COMMANDS if words[0] in OURS))
CLASSES = 10
IMAGES = ['data.name=image_folder', 'data.root=DIR', 'data.batch_size=4', 'data.eval_batch_size=10', '--no-sharpness']
GRIDS = [f'--grid=algorithms.{name}.rho=0.1' for name in ('sam', 'sam_direction', 'sam_magnitude', 'sgd_hess')]
FINETUNE = 'yamls/lm/finetune.yaml'
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings('ignore:The ``compute`` method of metric:UserWarning'),
    pytest.mark.filterwarnings('ignore:No (positive|negative) samples:UserWarning'),
]


@pytest.fixture(autouse=True)
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a reader has: a folder with the recipes and examples, and the images that a page writes as DIR."""
    for name in ('yamls', 'examples'):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def images() -> None:
    draws = np.random.default_rng(0)
    for split in ('train', 'test'):
        for label in range(CLASSES):
            folder = Path('DIR', split, str(label))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draws.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / 'only.png')


def short(words: list[str]) -> Iterator[str]:
    """The command with changes that make it short: other sizes, one seed and radius, fewer steps and samples."""
    command, language = words[0], any('lm/' in word for word in words)
    for word in words:
        yield str(small_finetuning()) if word == FINETUNE else word
    if command == 'train' and '--dry-run' not in words:
        yield 'max_duration=2ba'
    elif command in ('compare', 'study', 'survive'):
        yield from ('max_duration=2ba', '--seeds', '1')
    if language:
        yield from TINY
    elif any('study/' in word and 'digits' not in word for word in words):
        images()
        yield from IMAGES
    if command == 'study':
        yield from ('--samples', '8', *(GRIDS if any('study/' in word for word in words) else []))
    if command == 'survive':
        yield from ('--samples', '8', '--draws', '1')
    if command in ('landscape', 'sharpness'):
        yield from ('--samples', '16')
    if command == 'landscape':
        yield from ('--resolution', '5')


def small_finetuning() -> Path:
    recipe = Path('finetune.yaml')
    recipe.write_text(
        f'base: {FINETUNE}\nmax_duration: 2ba\nscheduler: {{t_warmup: 1ba}}\ndevice_train_microbatch_size: 8\n'
        'data: {max_bytes: 20000, sequence_length: 32, batch_size: 8, eval_batch_size: 16}\n'
    )
    return recipe


def launched(commands: list[list[str]]) -> None:
    """Run commands of the launcher together, each as one node of a run."""
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    launcher = (sys.executable, '-m', 'composer.cli')
    nodes = [
        subprocess.Popen([*launcher, *words, 'max_duration=2ba'], env=environment, stderr=subprocess.PIPE, text=True)
        for words in commands
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=300)
        assert node.returncode == 0, errors


@pytest.mark.parametrize('page', SHOWN)
def test_every_command_of_a_page_runs(page: str, capfd: pytest.CaptureFixture[str]) -> None:
    nodes: list[list[str]] = []
    for name, (program, *words) in COMMANDS:
        if name != page or program not in OURS:
            continue
        if program == 'composer-sam':
            assert main(list(short(expanded(words)))) == 0, (words, capfd.readouterr().err)
        elif '--world_size' in words:
            nodes.append(words)
        else:
            launched([words])
    if nodes:
        launched(nodes)
    assert capfd.readouterr().out


def test_every_page_with_commands_is_run() -> None:
    assert {'README.md', 'language_models.md', 'landscapes.md', 'many_gpus.md', 'study.md', 'sam.md'} <= {*SHOWN}

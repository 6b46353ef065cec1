"""The examples run as their first lines say, and print what they claim."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / 'examples'
TABLE = (EXAMPLES / 'README.md').read_text()
# Seconds of all cores together. The time on the wall is that of whatever else the machine does.
MOST_SECONDS = 120
DATA, RECIPE = 'noisy_digits.py', 'own.py'  # not programs of their own
PROGRAMS = sorted(path.name for path in EXAMPLES.glob('*.py') if path.name not in (DATA, RECIPE))
RESULT = re.compile(r'^(\w+): test accuracy ([\d.]+)%, .*?(\d+) steps, (\d+) passes$', re.MULTILINE)


def _docstring(program: str) -> str:
    return ast.get_docstring(ast.parse((EXAMPLES / program).read_text())) or ''


def _commands(program: str) -> list[str]:
    """The command lines that the program says it is run by."""
    return re.findall(r'^Run: (.+)$', _docstring(program), flags=re.MULTILINE)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run(command: str) -> str:
    """Run the command from the root of the repository, as a user would, and return what it prints."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    before = _cpu_seconds()
    done = subprocess.run(
        shlex.split(command),
        cwd=ROOT,
        env={**os.environ, 'PATH': path},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert _cpu_seconds() - before < MOST_SECONDS
    return done.stdout


def _results(printed: str, program: str) -> tuple[tuple[float, int, int], tuple[float, int, int]]:
    """Accuracy in percent, steps and passes, without SAM and with it."""
    found = {name: (float(part), int(steps), int(passes)) for name, part, steps, passes in RESULT.findall(printed)}
    plain, sam = found
    assert sam == 'SAM', f'{program}: {printed}'
    return found[plain], found[sam]


# What is written about them.


def test_every_example_says_how_it_is_run_and_is_in_the_table() -> None:
    assert len(PROGRAMS) == 5
    for program in PROGRAMS:
        assert 30 <= len((EXAMPLES / program).read_text().splitlines()) <= 95, program
        assert re.search(r'^Time: about \d+ seconds\.$', _docstring(program), flags=re.MULTILINE), program
        (row,) = re.findall(rf'^\| \[{program}\]\({program}\) \| (.*?) \|', TABLE, flags=re.MULTILINE)
        assert row == ', '.join(f'`{command}`' for command in _commands(program)), program


def test_every_file_is_in_the_table_and_every_link_leads_somewhere() -> None:
    links = set(re.findall(r'\]\(([^)]+)\)', TABLE))
    assert [link for link in links if not (EXAMPLES / link).exists()] == []
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {'README.md'} <= links


# What they print.


def test_the_loop_shows_what_sam_gains_and_what_it_costs() -> None:
    (command,) = _commands('plain_loop.py')
    (sgd, steps, passes), (sam, sam_steps, sam_passes) = _results(_run(command), 'plain_loop.py')
    assert steps == passes == sam_steps == 60 * 21
    assert sam_passes == steps + 59 * 21  # the first epoch is plain SGD
    assert sam > 92 and sgd < sam - 5


def test_composers_trainer_shows_the_same() -> None:
    (command,) = _commands('composer_trainer.py')
    (sgd, steps, passes), (sam, sam_steps, sam_passes) = _results(_run(command), 'composer_trainer.py')
    assert steps == passes == sam_steps == 40 * 21
    assert sam_passes == steps + 39 * 21
    assert sam > 90 and sgd < sam - 5


def test_the_model_of_transformers_is_trained_both_ways() -> None:
    pytest.importorskip(
        'transformers', reason="transformers is not installed: pip install 'composer-sam[transformers]'"
    )
    pytest.importorskip('accelerate', reason="accelerate is not installed: pip install 'composer-sam[transformers]'")
    (command,) = _commands('hugging_face.py')
    printed = _run(command)
    (adamw, steps, passes), (sam, sam_steps, sam_passes) = _results(printed, 'hugging_face.py')
    assert steps == passes == sam_steps
    assert steps < sam_passes < 2 * steps
    assert sam > 90 and adamw < sam - 5
    assert "'sam/rho': 0.3" in printed  # Trainer's own log


@pytest.mark.parametrize('command', _commands('ddp.py'), ids=lambda command: command.split()[0])
def test_two_processes_keep_the_same_weights(command: str) -> None:
    printed = _run(command)
    assert re.search(r'^2 ranks, 168 steps of SAM, test accuracy \d\d\.\d%$', printed, flags=re.MULTILINE), printed
    assert 'perturbed weights are the same on all ranks: 0 of 8 times\n' in printed
    assert 'weights after a step are bit-identical on all ranks: 8 of 8 times\n' in printed


def test_both_launchers_are_shown() -> None:
    assert [command.split()[0] for command in _commands('ddp.py')] == ['torchrun', 'composer']


def test_wrong_labels_make_a_network_sharper() -> None:
    (command,) = _commands('sharpness.py')
    rows = re.findall(r'^ *(\d+)% +([\d.]+) +([\d.]+) +([\d.]+) ± [\d.]+ +([\d.]+)$', _run(command), flags=re.MULTILINE)
    right, wrong = ([float(cell) for cell in row] for row in rows)
    assert (right[0], wrong[0]) == (0, 40)
    assert all(0 < ours < theirs for ours, theirs in zip(right[1:], wrong[1:], strict=True)), rows


# The notebook.


def _notebook() -> Any:
    nbformat = pytest.importorskip('nbformat', reason='nbclient is not installed: pip install nbclient ipykernel')
    return nbformat.read(EXAMPLES / 'demo.ipynb', as_version=4)


def test_the_notebook_is_small_and_whole() -> None:
    notebook = _notebook()
    assert (EXAMPLES / 'demo.ipynb').stat().st_size < 300_000
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 3
    assert not [output for output in outputs if output.output_type == 'error']
    assert str(ROOT) not in str(notebook)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_pictures(tmp_path: Path) -> None:
    """In a folder of its own, so that it trains and finds nothing of earlier runs."""
    nbclient = pytest.importorskip('nbclient', reason='nbclient is not installed: pip install nbclient ipykernel')
    if importlib.util.find_spec('ipykernel') is None:
        pytest.skip('ipykernel is not installed: pip install ipykernel')
    notebook = _notebook()
    (tmp_path / 'examples').mkdir()
    (tmp_path / 'yamls').symlink_to(ROOT / 'yamls')
    folder = {'metadata': {'path': str(tmp_path / 'examples')}}
    nbclient.NotebookClient(notebook, timeout=3600, kernel_name='python3', resources=folder).execute()
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 3
    printed = ''.join(output.text for output in outputs if output.output_type == 'stream' and output.name == 'stdout')
    eigenvalues = dict(re.findall(r'^ *([\w, ]+): largest eigenvalue ([\d.]+)', printed, flags=re.MULTILINE))
    assert list(eigenvalues) == ['SGD', 'SGD, stopped early', 'SAM']
    assert 0 < float(eigenvalues['SAM']) < float(eigenvalues['SGD, stopped early']) < float(eigenvalues['SGD'])

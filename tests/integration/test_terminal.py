"""What the commands show: in terminals of different widths, in logs, and where nobody reads on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pseudo_terminal import in_terminal

from composer_sam.commands.main import main

REPOSITORY = Path(__file__).parents[2]
SGD, SAM = (str(REPOSITORY / 'yamls' / 'digits' / f'{name}.yaml') for name in ('sgd', 'sam'))
WITH_SAM, WITH_SGDHESS = (str(REPOSITORY / 'yamls' / 'methods' / f'{name}.yaml') for name in ('sam', 'sgd_hess'))
PATH = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get('PYTHONPATH')]))

BAR = re.compile(r'epoch \d+/\d+  step \d+/\d+.* [━╸╺]+ (--:--|\d+:\d+)')
FAILED = (
    'composer-sam: training failed: the training loss is not finite from step 2 on; training was stopped after '
    'step 11. Try a lower optimizer.lr (now 1e+30)'
)


@pytest.mark.parametrize('columns', [80, 200])
def test_in_a_terminal_messages_have_lines_of_their_own_and_the_bar_fits(columns: int) -> None:
    seen = in_terminal(columns, 'train', SGD, WITH_SAM, 'max_duration=3ep', 'optimizer.lr=1e30')
    assert seen.code == 1
    starting, overlaid, described, *above, bar, failed = seen.lines
    assert starting == f'starting {SGD} ...'
    assert described.startswith(
        'SAM: mlp with 85,002 parameters, digits, SAM (rho 0.05), base optimizer sgd (lr 1e+30)'
    )
    assert 'sam.yaml over' in overlaid and not overlaid.startswith('warning')
    assert above[0].startswith('warning: ')
    assert not any(BAR.search(line) for line in above)
    assert BAR.fullmatch(bar) and bar.startswith('epoch 1/3  step 11/63  loss nan ')
    assert len(bar) == columns
    assert failed.startswith(FAILED) and 'algorithms.sam.rho (now 0.05)' in failed


@pytest.mark.parametrize('columns', [80, 200])
def test_in_a_terminal_a_mistake_is_one_line(columns: int) -> None:
    seen = in_terminal(columns, 'train', SGD, 'optimizer.momentun=0.1')
    assert seen.code == 2
    starting, mistake = seen.lines
    assert starting.startswith('starting ')
    assert mistake.startswith('composer-sam: optimizer.momentun: unknown key (value 0.1); did you mean momentum')


def test_a_method_that_differentiates_twice_shows_one_bar_and_nothing_else() -> None:
    seen = in_terminal(80, 'train', SGD, WITH_SGDHESS, 'max_duration=2ep')
    assert seen.code == 0
    assert 'create_graph' not in seen.written and 'NODENAME' not in seen.written
    described, bar, result = seen.lines[-3:]
    assert len(seen.lines) == 5, seen.lines  # the first two: that it starts, and what the overlay changes
    assert 'SGDHess (rho ' in described
    assert BAR.fullmatch(bar) and bar.startswith('epoch 2/2  step 42/42  loss ')
    assert result.startswith('SGDHess: test accuracy ')


@pytest.mark.parametrize(
    ('command', 'at', 'bar', 'line'),
    [
        ('train', 'starting', 'starting .*', 'composer-sam: interrupted'),
        ('train', 'step 3', r'epoch .* step .*', r'composer-sam: interrupted after \d+ steps'),
        ('compare', '1 %', r'training 2 runs .*', 'composer-sam: interrupted'),
    ],
)
def test_an_interrupt_is_one_line_below_one_bar(command: str, at: str, bar: str, line: str, tmp_path: Path) -> None:
    arguments = {'train': ['max_duration=1000ep'], 'compare': [SGD, '--out', str(tmp_path), 'max_duration=100ep']}
    seen = in_terminal(80, command, SAM, *arguments[command], interrupt_at=at)
    assert seen.code == 130
    assert re.fullmatch(line, seen.lines[-1])
    assert [bool(re.fullmatch(rf'(\^C)?{bar}', shown)) for shown in seen.lines].count(True) <= 2  # one ends with ^C
    assert 'Traceback' not in seen.written


def test_a_log_has_lines_and_no_bar(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(['train', SAM, 'max_duration=40ep', 'eval_interval=1ep']) == 0
    captured = capfd.readouterr()
    assert captured.out.count('\n') == 1 and captured.out.startswith('SAM: test accuracy ')
    starting, described, *lines = captured.err.splitlines()
    assert starting == f'starting {SAM} ...'
    assert described.endswith('cpu, 1 process')
    assert 15 <= len(lines) <= 30
    assert all(re.fullmatch(r'epoch \d+/40  step \d+/840  loss \d\.\d{4}  test \d+\.\d\d%', line) for line in lines)
    assert '\r' not in captured.err and '\x1b' not in captured.err


def test_a_run_with_few_tests_has_lines_too(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(['train', SGD, 'max_duration=100ba', 'eval_interval=0']) == 0
    lines = capfd.readouterr().err.splitlines()[2:]
    assert [line.split('  ')[1] for line in lines] == [f'step {step}/100' for step in range(10, 100, 10)]


def test_a_warning_in_a_log_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(['train', SGD, WITH_SAM, 'optimizer.lr=1e30', 'max_duration=1ep']) == 1
    *warnings, failed = capfd.readouterr().err.splitlines()
    assert [line for line in warnings if line.startswith('warning: ')]
    assert failed.startswith(FAILED)


def test_composers_bar_and_loggers_are_there_by_name(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(['train', SGD, 'max_duration=1ep', 'trainer.progress_bar=true']) == 0
    captured = capfd.readouterr().err
    assert 'train          Epoch   0:' in captured
    assert 'epoch 1/1' not in captured


@pytest.mark.parametrize(
    'arguments', [['methods'], ['--help'], ['recipes'], ['keys'], ['train', SGD, '--dry-run'], ['train', SGD]], ids=str
)
def test_where_nobody_reads_on_a_command_ends_quietly(arguments: list[str], tmp_path: Path) -> None:
    errors = tmp_path / 'errors'
    with errors.open('w') as file:
        process = subprocess.Popen(
            [sys.executable, '-m', 'composer_sam', *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if arguments == ['train', SGD] else file,
            cwd=REPOSITORY,
            env={**os.environ, 'PYTHONPATH': PATH},
        )
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        code = process.wait(timeout=120)
    assert code in (0, 141)
    complaints = errors.read_text().splitlines()
    assert [line for line in complaints if not line.startswith('starting ')] == []


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    from composer_sam import __version__

    assert main(['--version']) == 0
    assert capsys.readouterr().out == f'composer-sam {__version__}\n'


def test_the_list_of_methods_imports_torch_and_what_torch_needs_only() -> None:
    script = "import sys; from composer_sam.commands.main import main; main(['methods']); print(*sys.modules)"
    printed = subprocess.run(
        [sys.executable, '-c', script],
        env={**os.environ, 'PYTHONPATH': PATH},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.splitlines()[-1]
    imported = {name.partition('.')[0] for name in printed.split()}
    assert 'torch' in imported
    assert {'composer', 'rich', 'pydantic', 'omegaconf', 'torchvision', 'scipy', 'matplotlib'}.isdisjoint(imported)

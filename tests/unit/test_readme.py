"""What the README shows runs, promises name tests that are there, and the commands of all pages are understood."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.cli import launcher

from composer_sam.commands.main import main
from composer_sam.recipes import is_override, load_recipe
from tests.pages import COMMANDS, FENCE, PAGES, ROOT, expanded
from tests.readers import stand_ins

README = (ROOT / 'README.md').read_text()
TABLE = (ROOT / 'docs' / 'promises.md').read_text()


def test_every_promise_names_a_test_that_exists() -> None:
    sources = '\n'.join(path.read_text() for path in (ROOT / 'tests').rglob('test_*.py'))
    rows = [line for line in TABLE.splitlines() if line.startswith('| ')][1:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r'`(test[\w/.]+)`', row.split('|')[2])
        assert named, row
        for name in named:
            assert (ROOT / name).is_file() if '/' in name else f'def {name}(' in sources, name


def test_it_is_short_and_its_commands_are_on_the_first_screen() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert {'make demo', 'make test'} <= {line.split('  ')[0] for line in lines[:25]}


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r'\]\(([^)#:]+)\)', README)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


# What it shows in Python.


def test_every_python_block_runs() -> None:
    """In order and in one namespace, as a reader goes down the page; each with a model that has not been trained."""
    blocks = [
        (README.count('\n', 0, found.start(2)), found[2]) for found in FENCE.finditer(README) if found[1] == 'python'
    ]
    assert len(blocks) >= 2
    namespace: dict[str, Any] = {'__name__': 'readme'}
    for line, block in blocks:
        namespace.update(stand_ins(block))
        before = [parameter.detach().clone() for parameter in namespace['model'].parameters()]
        # Empty lines put the errors' line numbers right.
        exec(compile('\n' * line + block, 'README.md', 'exec', dont_inherit=True), namespace)
        after = list(namespace['model'].parameters())
        assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True)), f'nothing is trained in {block}'


# What it shows in a shell.


OURS = [(page, words[1:]) for page, words in COMMANDS if words[0] == 'composer-sam']
LAUNCHED = [(page, words[1:]) for page, words in COMMANDS if words[0] == 'composer']
MADE = [(page, words[1:]) for page, words in COMMANDS if words[0] == 'make']
LOOP = ('for', 'do', 'done', 'mkdir', 'ls')  # docs/study.md sorts images into folders


def _ids(value: object) -> str | None:
    return ' '.join(value) if isinstance(value, list) else None


def test_every_command_line_is_of_a_kind_that_is_checked() -> None:
    assert {words[0] for _, words in COMMANDS} <= {'composer-sam', 'composer', 'make', 'pip', *LOOP}
    assert len(OURS) > 10 and len(LAUNCHED) > 2 and MADE


def test_every_extra_is_there() -> None:
    extras = re.search(
        r'^\[project.optional-dependencies\]\n(.*?)^\[', (ROOT / 'pyproject.toml').read_text(), re.M | re.S
    )
    assert extras is not None
    known = set(re.findall(r'^([\w-]+) = ', extras[1], flags=re.MULTILINE))
    installed = [word for _, words in COMMANDS if words[0] == 'pip' for word in words if 'composer-sam' in word]
    named = {extra for word in installed for extra in re.findall(r'[\w-]+', word.partition('[')[2])}
    assert installed and named and named <= known


def _parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the program makes of its arguments, without doing it."""
    seen: list[argparse.Namespace] = []

    def run(options: argparse.Namespace) -> int:
        seen.append(options)
        return 0

    original = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        options, further = original(self, *args, **kwargs)
        assert options is not None
        options.command = run
        return options, further

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, 'parse_known_args', parse_known_args)
        assert main(arguments) == 0
    (options,) = seen
    return options


def _check_recipes(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command line of ours, and load every recipe it names with the overrides it gives."""
    options = vars(_parsed(arguments, monkeypatch))
    changes: list[str] = options.get('changes', [])
    files = [change for change in changes if not is_override(change)]
    overrides = [change for change in changes if is_override(change)]
    command: str = arguments[0]
    recipe: str = options.get('recipe', '')
    if command == 'train':
        load_recipe(recipe, files, overrides)
    elif command in ('landscape', 'sharpness'):
        assert files and all(file.endswith('.pt') for file in files)
        if recipe:  # otherwise the one beside the checkpoints
            load_recipe(recipe, (), overrides)
    else:
        grids = [grid.partition('=') for grid in options.get('grid', [])]
        for file in files:
            load_recipe(file, (), overrides)
            for key, _, values in grids:
                for value in values.split(','):
                    load_recipe(file, (), [*overrides, f'{key}={value}'])
    assert recipe or files or command in ('demo', 'methods', 'recipes', 'keys')


@pytest.fixture
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures('_at_the_root')
@pytest.mark.parametrize(('page', 'words'), OURS, ids=_ids)
def test_every_command_line_of_ours_is_understood(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _check_recipes(expanded(words), monkeypatch)


@pytest.mark.usefixtures('_at_the_root')
@pytest.mark.parametrize(('page', 'words'), LAUNCHED, ids=_ids)
def test_every_command_line_of_the_launcher_is_understood(
    page: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Composer's launcher knows the options, and what it starts is our program."""
    started = words.index('-m') + 2
    assert words[started - 1] == 'composer_sam'
    monkeypatch.setattr('sys.argv', ['composer', '--help'])
    with pytest.raises(SystemExit, match='0'):
        launcher.main()
    known = capsys.readouterr().out
    for word in words[: started - 2]:
        if word.startswith('-'):
            assert re.search(rf'(^|[\s,]){re.escape(word)}\b', known), f'the launcher has no {word}'
    _check_recipes(expanded(words[started:]), monkeypatch)


@pytest.mark.parametrize(('page', 'words'), MADE, ids=_ids)
def test_every_make_target_is_there(page: str, words: list[str]) -> None:
    targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), flags=re.MULTILINE)
    assert {word for word in words if '=' not in word} <= set(targets)


def test_make_demo_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = re.findall(r'^demo:.*\n\t(.*)$', (ROOT / 'Makefile').read_text(), flags=re.MULTILINE)
    program, *words = shlex.split(line)
    assert program.endswith('/composer-sam') and words == ['demo']
    _check_recipes(words, monkeypatch)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_every_yaml_block_is_part_of_a_recipe(page: Path, tmp_path: Path) -> None:
    for number, found in enumerate(found for found in FENCE.finditer(page.read_text()) if found[1] == 'yaml'):
        overlay = tmp_path / f'{number}.yaml'
        overlay.write_text(found[2])
        load_recipe(str(ROOT / 'yamls' / 'digits' / 'sgd.yaml'), [str(overlay)], [])

"""What maintainers need: workflows, hooks, issue forms and the citation fit the Makefile and the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from composer_sam.version import __version__

yaml = pytest.importorskip('yaml')

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / '.github'
WORKFLOWS = sorted((GITHUB / 'workflows').glob('*.yml'))
FORMS = sorted(path for path in (GITHUB / 'ISSUE_TEMPLATE').glob('*.yml') if path.name != 'config.yml')
PAGES = [ROOT / name for name in ('CONTRIBUTING.md', 'SECURITY.md', 'CODE_OF_CONDUCT.md')]
MAKE = re.compile(r'\bmake ([\w-]+)')


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def _jobs(workflow: Path) -> dict[str, Any]:
    return _read(workflow)['jobs']


def _commands(job: dict[str, Any]) -> list[str]:
    """What the job's steps run, once for every value of its matrix that they name."""
    matrix: dict[str, Any] = dict(job.get('strategy', {}).get('matrix', {}))
    rows = [*matrix.pop('include', []), *({key: value} for key, values in matrix.items() for value in values)]
    commands: list[str] = []
    for step in job.get('steps', []):
        todo = [step['run']] if 'run' in step else []
        while todo:
            command = todo.pop()
            named = re.search(r'\$\{\{\s*matrix\.([\w-]+)\s*\}\}', command)
            if named is None:
                commands.append(command)
                continue
            values = [row[named[1]] for row in rows if named[1] in row]
            assert values, f'the matrix has no {named[1]}: {command}'
            todo += [command.replace(named[0], str(value)) for value in values]
    return commands


def _targets() -> set[str]:
    return set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), flags=re.MULTILINE))


def test_every_make_target_of_the_workflows_is_there() -> None:
    commands = [command for path in WORKFLOWS for job in _jobs(path).values() for command in _commands(job)]
    called = {target for command in commands for target in MAKE.findall(command)}
    assert {'lint', 'types', 'test', 'test-torch', 'test-all', 'build'} <= called
    assert called <= _targets(), f'the Makefile has no {sorted(called - _targets())}'


@pytest.mark.parametrize('page', [ROOT / 'CONTRIBUTING.md', GITHUB / 'pull_request_template.md'], ids=lambda p: p.name)
def test_every_make_target_of_the_pages_is_there(page: Path) -> None:
    called = set(re.findall(r'`make ([\w-]+)', page.read_text()))
    assert called and called <= _targets()


def test_all_targets_but_files_are_phony() -> None:
    (phony,) = re.findall(r'^\.PHONY: (.*)$', (ROOT / 'Makefile').read_text(), flags=re.MULTILINE)
    assert set(phony.split()) == _targets()


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_ask_for_little_and_end(path: Path) -> None:
    """They may read the repository, use no secret, have a bound of time, and name the major version of every action."""
    workflow = _read(path)
    assert workflow['permissions'] == {'contents': 'read'}
    assert 'secrets.' not in path.read_text()
    assert 'group' in workflow['concurrency'] and 'cancel-in-progress' in workflow['concurrency']
    for name, job in workflow['jobs'].items():
        assert 'uses' in job or job['timeout-minutes'] <= 300, name
        assert job.get('permissions', {}) in ({}, {'id-token': 'write'}), name
        for step in job.get('steps', []):
            assert 'run' in step or re.fullmatch(r'[\w.-]+/[\w.-]+@(release/)?v\d+', step['uses']), step


def _actionlint() -> str | None:
    beside_python = str(Path(sys.executable).parent)
    return shutil.which('actionlint', path=os.pathsep.join((beside_python, os.environ.get('PATH', os.defpath))))


@pytest.mark.slow
@pytest.mark.skipif(_actionlint() is None, reason='actionlint is not installed; make hooks runs it')
def test_actionlint_finds_nothing() -> None:
    command = [str(_actionlint()), '-no-color', *map(str, WORKFLOWS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('path', FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_what_github_requires(path: Path) -> None:
    form = _read(path)
    assert {'name', 'description', 'body'} <= set(form)
    asked = [field for field in form['body'] if field['type'] != 'markdown']
    assert asked and {field['type'] for field in asked} <= {'checkboxes', 'dropdown', 'input', 'textarea'}
    labels = [field['attributes']['label'] for field in asked]
    names = [field['id'] for field in asked]
    assert len({*labels}) == len(labels) and len({*names}) == len(names)
    for field in asked:
        if field['type'] == 'dropdown':
            options = field['attributes']['options']
            assert options and all(isinstance(option, str) for option in options)
    for field in form['body']:
        assert field['type'] != 'markdown' or field['attributes']['value'].strip()


def test_there_is_a_form_for_bugs_and_one_for_methods() -> None:
    assert [path.stem for path in FORMS] == ['bug', 'new_method']
    assert isinstance(_read(GITHUB / 'ISSUE_TEMPLATE' / 'config.yml')['blank_issues_enabled'], bool)


def test_the_citation_is_of_this_version() -> None:
    citation = _read(ROOT / 'CITATION.cff')
    assert {'cff-version', 'message', 'title', 'authors', 'version'} <= set(citation)
    assert citation['version'] == __version__


def test_the_hooks_have_a_ruff_that_pyproject_allows() -> None:
    entries = _read(ROOT / '.pre-commit-config.yaml')['repos']
    hooks = {entry['repo'].rsplit('/', 1)[1]: entry['rev'] for entry in entries}
    assert {'pre-commit-hooks', 'actionlint'} <= set(hooks)
    (least,) = re.findall(r"^\s*'ruff>=([\d.]+)'", (ROOT / 'pyproject.toml').read_text(), flags=re.MULTILINE)
    used = tuple(map(int, hooks['ruff-pre-commit'].removeprefix('v').split('.')))
    assert used >= tuple(map(int, least.split('.')))


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r'\]\(([^)#:]+)\)', page.read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []

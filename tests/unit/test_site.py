"""The site of the documentation: it builds without a warning, no link is broken, and every page is two clicks away."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

import composer_sam
from composer_sam import registry

ROOT = Path(__file__).parents[2]
DOCS = ROOT / 'docs'
PAGES = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob('*.md')}
NAVIGATION = (ROOT / 'mkdocs.yml').read_text().split('\nnav:\n')[1]
API = {page.name: page.read_text() for page in (DOCS / 'api').glob('*.md')}


def _hooks() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location('hooks', DOCS / '_site' / 'hooks.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_navigation_lists_every_page_once() -> None:
    listed = re.findall(r'[\w/]+\.md', NAVIGATION)
    assert len(listed) == len(set(listed))
    assert set(listed) == PAGES


def test_no_page_is_more_than_a_section_below_a_tab() -> None:
    """A tab is one click; its pages, and those of its sections, are beside it."""
    depths = {(len(line) - len(line.lstrip())) // 4 for line in NAVIGATION.splitlines() if line.strip()}
    assert depths <= {0, 1, 2}


@pytest.mark.parametrize(('page', 'expected'), [('index.md', '## Install\n'), ('contributing.md', '# Contributing')])
def test_parts_of_other_files_are_there(page: str, expected: str) -> None:
    found: set[Path] = set()
    text = _hooks().whole((DOCS / page).read_text(), page, found)
    assert expected in text and '--8<--' not in text
    assert page != 'index.md' or (found and '](docs/' not in text and '](plain_pytorch.md)' in text)


def test_a_part_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no part 'nothing'"):
        _hooks().whole('--8<-- "README.md:nothing"', 'index.md', set())


def test_links_out_of_the_docs_lead_to_pages_of_the_site() -> None:
    code = '```\n[d](../README.md)\n```\n'
    text = f'[a](../yamls/digits/sam.yaml) `[b](../x)` [c](limits.md#memory)\n{code}[e](../README.md)'
    found: set[Path] = set()
    assert _hooks().linked(text, DOCS, 'choosing.md', found) == (
        f'[a](repository/yamls/digits/sam.yaml.md) `[b](../x)` [c](limits.md#memory)\n{code}[e](index.md)'
    )
    assert ROOT / 'yamls' / 'digits' / 'sam.yaml' in found


def test_the_reference_has_every_public_name() -> None:
    shown = set(re.findall(r'^::: composer_sam[\w.]*\.(\w+)$', '\n'.join(API.values()), flags=re.MULTILINE))
    shown |= set(re.findall(r'\w+', ' '.join(re.findall(r'members: \[(.*)\]', API['methods.md']))))
    assert set(composer_sam.__all__) - {'__version__'} <= shown
    methods = re.findall(r'^::: (composer_sam\.methods\.\w+\.\w+)$', API['methods.md'], flags=re.MULTILINE)
    assert methods[1:] == [f'{method.__module__}.{name}' for name, method in registry.items()]


# The site as it is built.


@pytest.fixture(scope='module')
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec('mkdocs') is None:
        pytest.skip("mkdocs is not installed: pip install -e '.[docs]'")
    site = tmp_path_factory.mktemp('site')
    done = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(site)],
        cwd=ROOT,
        env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return site


def _links(page: Path) -> Iterator[tuple[str, str]]:
    """Every local path and anchor that a page refers to."""
    for target in re.findall(r'\b(?:href|src)="([^"]*)"', page.read_text()):
        if not re.match(r'[a-z]+:', target):
            path, _, anchor = html.unescape(target).partition('#')
            yield unquote(path), unquote(anchor)


@pytest.mark.slow
def test_no_link_of_the_site_is_broken(built: Path) -> None:
    pages = {
        page: {html.unescape(name) for name in re.findall(r'\b(?:id|name)="([^"]*)"', page.read_text())}
        for page in built.rglob('*.html')
        if page.name != '404.html'
    }
    assert len(pages) > len(PAGES)
    for page in pages:
        for path, anchor in _links(page):
            linked = (page.parent / path).resolve() if path else page
            linked = linked / 'index.html' if linked.is_dir() else linked
            assert linked.exists(), f'{page.relative_to(built)}: {path}'
            if anchor and anchor != '__skip' and linked in pages:
                assert anchor in pages[linked], f'{page.relative_to(built)}: {path}#{anchor}'


@pytest.mark.slow
def test_every_page_is_two_clicks_from_the_start(built: Path) -> None:
    start = built / 'index.html'
    reached, edge = {start}, {start}
    for _ in range(2):
        edge = {(page.parent / path).resolve() for page in edge for path, _ in _links(page) if path.endswith('.html')}
        reached |= edge
    assert {(built / page).with_suffix('.html') for page in PAGES} <= reached


@pytest.mark.slow
def test_the_site_needs_no_network_and_shows_no_marks(built: Path) -> None:
    for page in (built / name for name in (Path(page).with_suffix('.html') for page in PAGES)):
        text = page.read_text()
        assert not re.search(r'<(script|link|img)\b[^>]*\b(src|href)="(https?:)?//', text), page
        shown = re.sub(r'<(code|pre|details)\b.*?</\1>', '', text, flags=re.DOTALL)
        assert not re.search(r'\.\. math::|:(math|class|func|meth|data):|arithmatex|\\lVert(?![^<]*">)', shown), page
    assert (built / 'methods' / 'gam.html').read_text().count('<svg role="img"') > 10
    assert (built / 'api' / 'diagnostics.html').read_text().count('<svg role="img"') > 3

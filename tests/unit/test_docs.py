"""What the documentation shows works, and what is generated is up to date."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / 'docs'
PAGES = sorted(DOCS.glob('*.md'))
# ```python before: lines of other implementations, which cannot be run.
BLOCK = re.compile(r'^```python\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page: Path) -> None:
    """The blocks of a page run in order, in one namespace."""
    text = page.read_text()
    namespace: dict[str, Any] = {'__name__': page.stem}
    for block in BLOCK.finditer(text):
        line = text.count('\n', 0, block.start(1))
        # Empty lines put the errors' line numbers right.
        exec(compile('\n' * line + block.group(1), str(page), 'exec', dont_inherit=True), namespace)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if target.startswith(('http://', 'https://')):
            continue
        path, _, anchor = target.partition('#')
        linked = page if not path else page.parent / path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r'^#+ (.*)$', linked.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}
            assert anchor in anchors, target


def test_the_pages_are_there() -> None:
    assert {page.stem for page in PAGES} >= {'migration', 'plain_pytorch'}

"""What the documentation shows works, and what is generated is up to date."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from composer_sam.methods import own_fields, registry, table
from composer_sam.methods.__main__ import document

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
    assert {page.stem for page in PAGES} >= {'methods', 'migration', 'plain_pytorch'}


def test_the_page_of_the_methods_is_the_generated_one() -> None:
    command = 'python -m composer_sam.methods > docs/methods.md'
    assert (DOCS / 'methods.md').read_text() == document(), f'run: {command}'


@pytest.mark.parametrize('name', registry)
def test_every_hyperparameter_has_a_range_and_a_meaning(name: str) -> None:
    section = document().split(f'\n## {name}\n')[1].split('\n## ')[0]
    rows = dict(re.findall(r'^\| `(\w+)` \| (.+) \|$', section, flags=re.MULTILINE))
    assert list(rows) == [field.name for field in own_fields(registry[name])]
    for row in rows.values():
        assert all(cell.strip() for cell in re.split(r'(?<!\\)\|', row)), row


def test_the_table_counts_the_collectives_that_two_ranks_take() -> None:
    """tests/distributed/test_reference.py counts them as they happen."""
    path = Path(__file__).parents[1] / 'distributed' / 'test_reference.py'
    (counted,) = re.findall(r'^COLLECTIVES = (.*)$', path.read_text(), flags=re.MULTILINE)
    assert {row['name']: row['collectives'] for row in table()} == ast.literal_eval(counted)


def test_counting_draws_no_random_numbers_and_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    before = torch.get_rng_state()
    table()
    assert torch.equal(before, torch.get_rng_state())
    assert not recwarn.list

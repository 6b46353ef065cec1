"""The README names tests and files that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / 'README.md').read_text()
TABLE = README.split('## What is promised')[1].split('## What it costs and what it brings')[0]


def test_every_promise_names_a_test_that_exists() -> None:
    sources = '\n'.join(path.read_text() for path in (ROOT / 'tests').rglob('test_*.py'))
    rows = [line for line in TABLE.splitlines() if line.startswith('| ')][1:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r'`(test[\w/.]+)`', row.split('|')[2])
        assert named, row
        for name in named:
            assert (ROOT / name).is_file() if '/' in name else f'def {name}(' in sources, name


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r'\]\(([^)#:]+)\)', README)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []

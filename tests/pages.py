"""The pages for readers, and the commands they show."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from composer_sam import shipped

__all__ = ['COMMANDS', 'FENCE', 'PAGES', 'ROOT', 'expanded']

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
FENCE = re.compile(r'^```([^\n]*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_SHELL = ('', 'console', 'sh', 'shell', 'bash')


def _command_lines(page: Path) -> Iterator[list[str]]:
    """The words of every command, without comments."""
    for found in FENCE.finditer(page.read_text()):
        if found[1].strip() not in _SHELL:
            continue
        for line in found[2].replace('\\\n', ' ').splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


COMMANDS = [(page.name, words) for page in PAGES for words in _command_lines(page)]


def expanded(words: list[str]) -> list[str]:
    """The words as a shell in the repository's root hands them over, and names of recipes as the program reads them."""
    found: list[str] = []
    for word in words:
        files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(word)) if '*' in word else []
        meant = files or shipped.expanded(word)
        assert '*' not in word or meant != [word], f'{word} matches nothing'
        found += meant
    return found

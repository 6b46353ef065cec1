"""What MkDocs does not do by itself: parts of other files, links out of this folder, and formulas as pictures.

Links to files that are outside ``docs`` lead to pages that show these files, so that the site has all it refers to and
needs no network, neither when it is built nor when it is read.
"""

from __future__ import annotations

import os
import re
import sys
from html import escape, unescape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / 'docs'

_INCLUDE = re.compile(r'^--8<-- "([^":]+)(?::(\w+))?"$', re.MULTILINE)
# A fence, code in a line, or the target of a link.
_LINK = re.compile(r'^```.*?^```$|`[^`\n]+`|\]\((?!\w+:)([^)\s#]+)(#[^)\s]*)?\)', re.MULTILINE | re.DOTALL)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_COPIED = ('.json', '.png')
_PAGES = {'README.md': 'index.md', 'CONTRIBUTING.md': 'contributing.md'}


def place(file: Path) -> str:
    """Return where the site has a file or folder of the repository, as a path within ``docs``."""
    path = file.relative_to(ROOT).as_posix()
    if file.is_relative_to(DOCS):
        return file.relative_to(DOCS).as_posix()
    if path in _PAGES:
        return _PAGES[path]
    if file.is_dir():
        return f'repository/{path}/index.md'
    return f'repository/{path}' if file.suffix in ('.md', *_COPIED) else f'repository/{path}.md'


def linked(text: str, folder: Path, page: str, found: set[Path]) -> str:
    """Return the text of a page with links as the site has them.

    Args:
        text: the Markdown.
        folder: the folder that the links are relative to in the repository.
        page: the path of the page within ``docs``.
        found: takes the files and folders that the text links to.
    """

    def link(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        file = Path(os.path.normpath(folder / match[1]))
        if not file.exists():
            return match[0]  # MkDocs reports it
        found.add(file)
        return f']({os.path.relpath(place(file), Path(page).parent)}{match[2] or ""})'

    return _LINK.sub(link, text)


def whole(text: str, page: str, found: set[Path]) -> str:
    """Return the text of a page with the parts of other files that it names."""

    def part(match: re.Match[str]) -> str:
        other = (ROOT / match[1]).read_text()
        if match[2]:
            start, end = (f'<!-- --8<-- [{mark}:{match[2]}] -->\n' for mark in ('start', 'end'))
            if other.count(start) != 1 or other.count(end) != 1:
                raise ValueError(f'{match[1]} has no part {match[2]!r}: {start.strip()} ... {end.strip()}')
            other = other.split(start)[1].split(end)[0]
        return linked(other, ROOT, page, found)

    return _INCLUDE.sub(part, linked(text, (DOCS / page).parent, page, found))


def shown(file: Path, found: set[Path]) -> str | bytes:
    """Return what the site has of a file or folder outside ``docs``."""
    if file.suffix in _COPIED:
        return file.read_bytes()
    name = file.relative_to(ROOT)
    if file.suffix == '.md':
        text = linked(file.read_text(), file.parent, place(file), found)
    elif file.is_dir():
        children = sorted(child for child in file.iterdir() if not child.name.startswith(('.', '_')))
        links = ''.join(f'- [{child.name}]({child.name})\n' for child in children)
        text = linked(f'# {name}\n\n{links}', file, place(file), found)
    else:
        text = f'# {name}\n\n````{ {".py": "python", ".yaml": "yaml"}.get(file.suffix, "") }\n{file.read_text()}````\n'
    return f'---\nsearch:\n  exclude: true\n---\n{text}'


def on_config(config: Any) -> Any:
    """Let docstrings.py beside this file import this package, which need not be installed."""
    sys.path.insert(0, str(ROOT))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add what the pages link to outside ``docs``."""
    from mkdocs.structure.files import File

    found: set[Path] = set()
    for file in files.documentation_pages():
        whole(file.content_string, file.src_uri, found)
    done: set[Path] = set()
    while waiting := {f for f in found if not f.is_relative_to(DOCS) and place(f) not in _PAGES.values()} - done:
        for file in sorted(waiting):
            files.append(File.generated(config, place(file), content=shown(file, found)))
        done |= waiting
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.generated_by:
        return markdown
    # "before" is a mark for the tests.
    return whole(markdown, page.file.src_uri, set()).replace('```python before\n', '```python\n')


def on_page_content(html: str, **_: Any) -> str:
    """Draw the formulas, so that they need neither a script nor a font of the reader's."""
    import ziamath

    ziamath.config.math.color = 'currentColor'
    ziamath.config.svg2 = False  # symbols of several pictures on one page would have the same names
    return _FORMULA.sub(lambda found: drawn(unescape(found[3]).strip(), block=found[2] == '['), html)


def drawn(latex: str, block: bool) -> str:
    """Return a formula as an SVG picture with its LaTeX as the text that readers of screens get."""
    import ziamath
    from latex2mathml.converter import convert

    # The norm's bars are as high as the letters; without a mark they grow with what stands beside them.
    mathml = convert(latex.replace('{aligned}', '{align*}'), display='block' if block else 'inline')
    mathml = re.sub(r'<mo[^>]*>(&#x02016;|&#x0007C;)</mo>', r'<mo stretchy="false">\1</mo>', mathml)
    formula = ziamath.Math(mathml, size=18 if block else 16)
    label = escape(' '.join(latex.split()), quote=True)
    shift = '' if block else f' style="vertical-align: {formula.getyofst():.1f}px"'
    picture = formula.svg().replace('<svg ', f'<svg role="img" aria-label="{label}"{shift} ', 1)
    return f'<div style="overflow-x: auto; text-align: center; margin: 1em 0">{picture}</div>' if block else picture

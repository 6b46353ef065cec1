"""An extension of Griffe that gives mkdocstrings the docstrings as Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, GriffeError, Module, Object

from composer_sam.markdown import of_docstring

_REFERENCE = re.compile(r':(?:class|data|func|meth|mod):`(~?)([\w.]+)`')


class Docstrings(Extension):
    """Convert mathematics, code and references, and shorten the docstrings of methods, which have their own pages."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        self._convert(pkg, pkg)

    def _convert(self, scope: Object, package: Module) -> None:
        if scope.docstring is not None:
            text = scope.docstring.value
            page = scope.path.split('.')[2:3]
            if isinstance(scope, Class) and scope.path.startswith('composer_sam.methods.') and page != ['base']:
                text = (
                    f'{text.splitlines()[0]}\n\n[Its page](../methods/{page[0]}.md) has the rule and everything else.'
                )
            text = _REFERENCE.sub(lambda found: self._link(found[1], found[2], scope, package), text)
            scope.docstring.value = of_docstring(re.sub(r'^Example:$', 'Examples:', text, flags=re.MULTILINE))
        for member in scope.members.values():
            if not member.is_alias:
                self._convert(member, package)

    def _link(self, short: str, name: str, scope: Object, package: Module) -> str:
        """Return a link to what a reference means, which is code alone where the site does not show that."""
        shown = name.rsplit('.', 1)[-1] if short else name
        try:
            path = name if name.startswith(f'{package.name}.') else scope.resolve(name)
            path = package.modules_collection[path].canonical_path
        except (GriffeError, KeyError):
            return f'``{shown}``'
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

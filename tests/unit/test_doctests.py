"""Every example in a docstring is run, and shows what it shows."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import composer_sam


def _modules() -> Iterator[str]:
    for module in pkgutil.walk_packages(composer_sam.__path__, 'composer_sam.'):
        if not module.name.endswith('__main__'):
            yield module.name


@pytest.mark.parametrize('name', list(_modules()))
def test_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in _modules()]
    found = [test for module in modules for test in finder.find(module) if test.examples]
    assert len(found) >= 20

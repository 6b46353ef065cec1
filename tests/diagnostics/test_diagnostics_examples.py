"""The examples in the diagnostics' documentation run and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize('name', ['hessian', 'measure', 'monitor', 'objective', 'sharpness'])
def test_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f'composer_sam.diagnostics.{name}'))
    assert results.attempted > 0
    assert results.failed == 0

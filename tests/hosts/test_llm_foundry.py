"""The entry points by which LLM Foundry's registry of algorithms finds the methods, without LLM Foundry."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from composer_sam import SAM, registry

GROUP = 'llmfoundry_algorithms'
NAMES = {method.__module__.rpartition('.')[2]: name for name, method in registry.items()}
ROOT = Path(__file__).parents[2]


def entry_points() -> EntryPoints:
    """The lines of pyproject.toml; what is installed may be older."""
    _, found, rest = (ROOT / 'pyproject.toml').read_text().partition(f'[project.entry-points.{GROUP}]\n')
    assert found
    lines = re.findall(r"^(\S+) = '(.*)'$", rest.partition('\n[')[0], re.MULTILINE)
    return EntryPoints(EntryPoint(name, value, GROUP) for name, value in lines)


def test_every_method_has_its_line() -> None:
    lines = {point.name: point.value for point in entry_points()}
    expected = {name: f'composer_sam.methods.llm_foundry:{method}' for name, method in NAMES.items()}
    for name, value in expected.items():
        assert lines.get(name) == value, f"pyproject.toml, [project.entry-points.{GROUP}]: add {name} = '{value}'"
    assert lines.keys() == expected.keys(), f'pyproject.toml, [project.entry-points.{GROUP}]: a line without a method'


def test_the_names_are_those_of_the_recipes() -> None:
    assert NAMES.keys() == {path.stem for path in (ROOT / 'yamls' / 'methods').glob('*.yaml')}


def test_the_registry_loads_the_methods_as_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    Algorithm = pytest.importorskip('composer.core').Algorithm
    catalogue = pytest.importorskip('catalogue', reason='catalogue is not installed')
    monkeypatch.setattr(catalogue, 'AVAILABLE_ENTRY_POINTS', entry_points())
    algorithms = catalogue.Registry(('llmfoundry', 'algorithms'), entry_points=True)
    for name, method in NAMES.items():
        found = algorithms.get(name)
        assert found is registry[method]
        assert issubclass(found, Algorithm), name
    assert algorithms.get_entry_points().keys() == NAMES.keys()
    with pytest.raises(AttributeError, match="'composer_sam.methods.llm_foundry' has no attribute 'SAMM'"):
        EntryPoint('samm', 'composer_sam.methods.llm_foundry:SAMM', GROUP).load()


def test_a_method_of_ones_own_is_an_algorithm_too() -> None:
    Algorithm = pytest.importorskip('composer.core').Algorithm
    import composer_sam.methods.llm_foundry  # noqa: F401

    class Mine(SAM): ...

    assert issubclass(Mine, Algorithm)

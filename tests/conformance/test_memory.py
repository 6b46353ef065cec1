"""What every method adds to the base step's memory, measured by the allocator's own record on 11 M parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import memory
from composer_sam import registry
from composer_sam.vectors import algebra, formulas
from tests.problems import REPRESENTATIVE, needs_graph

MEASURABLE = [name for name in registry if not needs_graph(name)]  # a graph is not the optimizer's memory


def marks(name: str, placement: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if placement == 'copy' and name not in REPRESENTATIVE else []


@pytest.mark.parametrize(
    ('name', 'placement'),
    [pytest.param(name, p, marks=marks(name, p)) for name in MEASURABLE for p in ('default', 'copy')],
)
def test_memory_is_what_the_method_states(name: str, placement: str) -> None:
    ((*_, held, peak, _, _),) = memory.memory_rows('resnet18', 'SGD', [name], [placement], torch.device('cpu'), ())
    assert abs(held - registry[name].held_copies) < 0.01
    assert registry[name].extra_copies - 1 < peak < registry[name].extra_copies + 0.05


@pytest.mark.parametrize('name', MEASURABLE)
def test_memory_is_no_more_where_factors_stay_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where reading a norm would wait: a vector is scaled in memory, not by a pending number."""
    monkeypatch.setattr(formulas, 'half_precision', lambda x: True)
    number = algebra.as_number
    monkeypatch.setattr(algebra, 'as_number', lambda a, half: a if isinstance(a, Tensor) else number(a, half))
    ((*_, held, peak, _, _),) = memory.memory_rows('resnet18', 'SGD', [name], ['default'], torch.device('cpu'), ())
    assert abs(held - registry[name].held_copies) < 0.01
    assert peak < registry[name].extra_copies + 0.05

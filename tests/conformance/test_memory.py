"""What every method adds to the base step's memory, measured by the allocator's own record on 11 M parameters."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import memory_rows
from composer_sam import registry
from tests.problems import needs_graph

MEASURABLE = [name for name in registry if not needs_graph(name)]  # a graph is not the optimizer's memory


@pytest.mark.parametrize('placement', ['default', 'copy'])
def test_memory_is_what_the_methods_state(placement: str) -> None:
    rows = memory_rows('resnet18', 'SGD', MEASURABLE, [placement], torch.device('cpu'))
    found = {row[2].split(',')[0]: row[3:5] for row in rows if 'Composer' not in row[2]}
    assert set(found) == set(MEASURABLE)
    for name, (held, peak) in found.items():
        assert held < 0.01, name
        assert registry[name].extra_copies - 1 < peak < registry[name].extra_copies + 0.05, name

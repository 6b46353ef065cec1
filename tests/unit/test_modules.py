"""The modules of a model, listed again where the model has changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from composer_sam.engine.modules import Modules


def nested() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.Identity()))


def replace(model: nn.Sequential) -> None:
    model[1][1] = nn.Dropout()


def add(model: nn.Sequential) -> None:
    model[0].add_module('extra', nn.Tanh())


def remove(model: nn.Sequential) -> None:
    del model[1][0]


def empty(model: nn.Sequential) -> None:
    model[1][0] = None  # type: ignore[assignment]


@pytest.mark.parametrize('change', [replace, add, remove, empty])
def test_a_change_anywhere_is_seen(change: Callable[[nn.Sequential], None]) -> None:
    model = nested()
    modules = Modules(model)
    assert modules.all() == list(model.modules())
    assert modules.all() is modules.all()
    change(model)
    assert modules.all() == list(model.modules())


@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated')
def test_scripted_modules_are_listed_every_time() -> None:
    scripted = torch.jit.script(nested())
    assert [type(module) for module in Modules(scripted).all()] == [type(module) for module in scripted.modules()]

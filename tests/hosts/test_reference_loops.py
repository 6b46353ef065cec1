"""The diffs of docs/other_trainers.md: loops after torchvision's and timm's scripts, before and after the change."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip('torchvision', reason="torchvision is not installed: pip install 'composer-sam[composer]'")

from torchvision.datasets import FakeData
from torchvision.transforms.functional import to_tensor

from composer_sam import SAM, SharpnessAwareOptimizer
from tests.conformance.parts import clipping
from tests.problems import same

# torchvision's FakeData makes its images the way that Pillow deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")

PAGE = Path(__file__).parents[2] / 'docs' / 'other_trainers.md'
ARGS = SimpleNamespace(lr=0.1, amp=False, clip_grad_norm=0.5, clip_grad=0.5, grad_accum_steps=2)
EPOCHS = 2


def sides(name: str) -> tuple[str, str]:
    """The program of the diff under the heading, before and after the change."""
    section = PAGE.read_text().split(f'\n### {name}\n')[1]
    (diff,) = re.findall(
        r'^```diff\n(.*?)^```$', section.split('\n## ')[0].split('\n### ')[0], re.MULTILINE | re.DOTALL
    )
    lines = [(line[:1] or ' ', line[1:]) for line in diff.splitlines()]
    return tuple('\n'.join(text for mark, text in lines if mark in (' ', kept)) for kept in '-+')  # pyright: ignore


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 4)
        )


def images() -> list[tuple[Tensor, Tensor]]:
    data = FakeData(24, (3, 8, 8), 4, transform=to_tensor)
    return list(torch.utils.data.DataLoader(data, batch_size=6))  # pyright: ignore[reportArgumentType]


def run(program: str, amp: bool = False) -> tuple[nn.Module, list[Tensor]]:
    """Run a side of a diff as the script that it is a part of."""
    model, losses = network(), []
    namespace: dict[str, Any] = {
        'torch': torch,
        'nn': nn,
        'model': model,
        'criterion': nn.CrossEntropyLoss(),
        'data_loader': images(),
        'args': SimpleNamespace(**{**vars(ARGS), 'amp': amp}),
        'log': lambda loss, *_: losses.append(loss.detach()),
    }
    exec(compile(program, 'diff', 'exec', dont_inherit=True), namespace)
    torch.manual_seed(1)
    for _ in range(EPOCHS):
        namespace['train_one_epoch']()
    return model, losses


def by_passes(name: str) -> nn.Module:
    """What the changed loop must end in."""
    model, accumulate = network(), {'torchvision': 1, 'timm': 2}[name]
    base: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    if name == 'timm':
        base = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.05)
    base.register_step_pre_hook(clipping(model, 0.5))
    optimizer = SharpnessAwareOptimizer(base, SAM(rho=0.05), model)
    data = images()
    torch.manual_seed(1)
    for _ in range(EPOCHS):
        for first in range(0, len(data), accumulate):
            for _ in optimizer.passes():
                optimizer.zero_grad()
                for x, y in data[first : first + accumulate]:
                    with torch.autocast('cpu', torch.bfloat16, enabled=name == 'timm'):
                        loss = nn.functional.cross_entropy(model(x), y) / accumulate
                    loss.backward()
    return model


@pytest.mark.parametrize('name', ['torchvision', 'timm'])
def test_the_changed_loop_takes_the_steps_of_a_loop_over_passes(name: str) -> None:
    _, after = sides(name)
    assert same(run(after)[0].state_dict(), by_passes(name).state_dict())


@pytest.mark.parametrize('name', ['torchvision', 'timm'])
def test_the_change_alters_nothing_but_the_direction(name: str) -> None:
    before, after = sides(name)
    plain, losses = run(before)
    idle, idle_losses = run(after.replace('SAM(rho=0.05)', 'SAM(rho=0.05, interval=1000)'))
    assert same(idle.state_dict(), plain.state_dict())
    assert same(idle_losses, losses)
    perturbed, perturbed_losses = run(after)
    assert not same(perturbed.state_dict(), plain.state_dict())
    assert torch.equal(perturbed_losses[0], losses[0]), 'the loss that is logged is not the one at w'


def test_torchvisions_scaler_stays_where_it_is() -> None:
    _, after = sides('torchvision')
    assert not same(run(after, amp=True)[0].state_dict(), network().state_dict())
    before, losses = run(sides('torchvision')[0], amp=True)
    idle, idle_losses = run(after.replace('SAM(rho=0.05)', 'SAM(rho=0.05, interval=1000)'), amp=True)
    assert same(idle.state_dict(), before.state_dict())
    assert same(idle_losses, losses)

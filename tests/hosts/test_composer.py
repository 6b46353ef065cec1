"""Composer's Trainer: its steps end in the bits of a plain loop, for every method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip('composer', reason="composer is not installed: pip install 'composer-sam[composer]'")

from composer import Trainer
from composer.algorithms import GradientClipping
from composer.models import ComposerClassifier

from composer_sam import SharpnessAwareOptimizer
from composer_sam.methods.base import SharpnessAware
from tests.conformance.parts import METHODS, loss_of
from tests.problems import BASES, batches, made, network, same

SIZE, CLIP = 12, 0.05


def by_passes(
    method: SharpnessAware, data: Sequence[tuple[Tensor, Tensor]], microbatch: int
) -> tuple[nn.Module, SharpnessAwareOptimizer]:
    """A plain loop, whose base optimizer clips what it is given."""
    model = network()
    base = BASES['SGD'](model.parameters())
    base.register_step_pre_hook(lambda *_: _nothing(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
    optimizer = SharpnessAwareOptimizer(base, method, model)
    for x, y in data:
        for _ in optimizer.passes():
            optimizer.zero_grad()
            for piece in zip(x.split(microbatch), y.split(microbatch), strict=True):
                loss = loss_of(model, piece) * (microbatch / SIZE)
                loss.backward(create_graph=method.backwards_create_graph)
    return model, optimizer


def _nothing(_: Any) -> None:
    """A hook must return nothing."""


@pytest.mark.parametrize('microbatch', [12, 4])
@pytest.mark.parametrize('name', METHODS)
def test_its_steps_are_those_of_a_plain_loop(name: str, microbatch: int) -> None:
    method = made(name, **({} if name in ('LookSAM', 'AESAM') else {'interval': 2}))
    data = batches(6, size=SIZE)
    torch.manual_seed(3)
    model, optimizer = by_passes(method, data, microbatch)

    module = network()
    base = BASES['SGD'](module.parameters())
    whole = TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    # A generator of its own: the loader must not draw from the stream that dropout draws from.
    loader = DataLoader(whole, batch_size=SIZE, generator=torch.Generator())
    trainer = Trainer(
        model=ComposerClassifier(module, num_classes=4),
        train_dataloader=loader,
        optimizers=base,
        algorithms=[method, GradientClipping(clipping_type='norm', clipping_threshold=CLIP)],
        max_duration='1ep',
        device='cpu',
        device_train_microbatch_size=microbatch,
        progress_bar=False,
    )
    torch.manual_seed(3)
    trainer.fit()
    assert same(module.state_dict(), model.state_dict())
    assert same(base.state_dict(), optimizer.state_dict())
    wrapped = trainer.state.optimizers[0]
    assert isinstance(wrapped, SharpnessAwareOptimizer)
    assert wrapped.steps_perturbed == optimizer.steps_perturbed > 0

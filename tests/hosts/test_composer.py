"""Composer's Trainer: its steps end in the bits of a plain loop, for every method."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip('composer', reason="composer is not installed: pip install 'composer-sam[composer]'")

from composer import Trainer
from composer.algorithms import GradientClipping
from composer.models import ComposerClassifier

from composer_sam import SharpnessAwareOptimizer
from tests.conformance.parts import CLIP, METHODS, by_passes
from tests.problems import BASES, batches, made, network, same

SIZE = 12


@pytest.mark.parametrize('microbatch', [12, 4])
@pytest.mark.parametrize('name', METHODS)
def test_its_steps_are_those_of_a_plain_loop(name: str, microbatch: int) -> None:
    method = made(name, **({} if name in ('LookSAM', 'AESAM') else {'interval': 2}))
    data = batches(6, size=SIZE)
    pieces = [piece for x, y in data for piece in zip(x.split(microbatch), y.split(microbatch), strict=True)]
    model, optimizer, _ = by_passes(method, pieces, SIZE // microbatch)

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

"""Composer's own algorithms beside ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from composer.algorithms import SAM as ComposerSAM
from composer.algorithms import GradientClipping
from composer.core import Event
from digits import METHODS, Recorder, build, weights

from composer_sam import SAM, registry


class Clipping(GradientClipping):
    """Notes the norm it finds each time it clips."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.norms: list[float] = []

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        if event == Event.AFTER_TRAIN_BATCH:
            gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
            self.norms.append(torch.nn.utils.get_total_norm(gradients).item())
        super().apply(event, state, logger)


@pytest.mark.parametrize('kind', ['norm', 'value', 'adaptive'])
@pytest.mark.parametrize('name', METHODS)
def test_gradient_clipping_acts_once_a_step_on_the_direction(name: str, kind: str) -> None:
    clipping = Clipping(kind, 0.05)
    ends = []
    for algorithms in ([clipping], [], [Clipping(kind, 1e9)]):
        trainer = build(registry[name](interval=2), *algorithms, max_duration='4ba')
        trainer.fit()
        assert trainer.state.algorithms[1:] == algorithms
        ends.append(weights(trainer))
    assert len(clipping.norms) == 4
    assert not torch.equal(ends[0], ends[1])
    if (
        kind != 'adaptive'
    ):  # which takes all of a gradient where the weights are zero, as BatchNorm's biases are at first
        assert torch.equal(ends[1], ends[2])  # what does not clip changes nothing


def test_clipping_by_norm_leaves_the_perturbation_alone() -> None:
    """At lr 0 the second pass's loss tells where the weights were; clipping must not have moved them."""
    losses = []
    for algorithms in ([], [GradientClipping('value', 1e-4)]):
        recorder = Recorder()
        trainer = build(SAM(rho=0.5), *algorithms, recorder=recorder, max_duration='1ba')
        trainer.fit()
        losses.append(recorder.losses)
    assert losses[0] == losses[1]


def test_an_error_in_a_pass_puts_the_clipping_back() -> None:
    clipping = Clipping('norm', 0.05)

    def fault(batch: int, index: int, state: Any) -> None:
        if (batch, index) == (2, 2):
            raise RuntimeError('injected')

    trainer = build(SAM(), clipping, recorder=Recorder(fault))
    before = list(trainer.state.algorithms)
    with pytest.raises(RuntimeError, match='injected'):
        trainer.fit()
    assert trainer.state.algorithms == before


@pytest.mark.parametrize('name', METHODS)
def test_composers_sam_and_ours_at_once_are_refused(name: str) -> None:
    trainer = build(ComposerSAM(), registry[name]())
    with pytest.raises(ValueError, match=f'composer.algorithms.SAM has wrapped .* use it or {name}, not both'):
        trainer.fit()

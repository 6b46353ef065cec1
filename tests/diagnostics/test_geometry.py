"""Direction against gradient: the numbers by hand, and training that does not notice being watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from composer_sam import SAM, WSAM, SharpnessAwareOptimizer, registry
from composer_sam.diagnostics import gradient_geometry
from composer_sam.engine.moment import Moment
from composer_sam.trainers.composer import GradientGeometryMonitor
from composer_sam.vectors import Layout, Vector
from tests.problems import BASES, Closure, batches, needs_graph, network, same, snapshot

NUMBERS = ['gradient_norm', 'direction_norm', 'cosine', 'share_larger', 'share_opposite']


def _observed(method: Any, steps: int = 1) -> tuple[list[dict[str, float]], list[Tensor], list[Tensor]]:
    """What the observer saw, and the flat gradients of the first and the last pass of the last step."""
    model = network(torch.float64, dropout=0.0)
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), method, model)
    seen: list[dict[str, float]] = []
    optimizer.observer = lambda g, d: seen.append(gradient_geometry(g, d).as_dict())
    passes: list[Tensor] = []

    for batch in batches(steps, torch.float64):
        inner = Closure(model, batch)
        passes.clear()

        def closure(inner: Closure = inner) -> Tensor:
            loss = inner()
            passes.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).clone())
            return loss

        optimizer.step(closure)
    return seen, passes[0], passes[-1]


def _by_hand(g: Tensor, d: Tensor) -> list[float]:
    return [
        g.norm().item(),
        d.norm().item(),
        (g @ d / (g.norm() * d.norm())).item(),
        sum(abs(b) > abs(a) for a, b in zip(g.tolist(), d.tolist(), strict=True)) / len(g),
        sum(a * b < 0 for a, b in zip(g.tolist(), d.tolist(), strict=True)) / len(g),
    ]


def test_of_sam_it_compares_the_two_gradients() -> None:
    seen, g, ascent = _observed(SAM(rho=0.5), steps=3)
    assert len(seen) == 3
    assert_close(list(seen[-1].values()), _by_hand(g, ascent), rtol=1e-7, atol=0)
    assert list(seen[-1]) == NUMBERS
    assert 0 < seen[-1]['share_larger'] < 1 and 0 < seen[-1]['share_opposite'] < 1


def test_of_a_decoupled_method_all_that_moves_the_weights_counts() -> None:
    (coupled,), g, ascent = _observed(WSAM(rho=0.5, gamma=0.8, decouple=False))
    (decoupled,), _, _ = _observed(WSAM(rho=0.5, gamma=0.8))
    assert_close(list(decoupled.values()), list(coupled.values()), rtol=1e-10, atol=0)
    assert_close(list(decoupled.values()), _by_hand(g, g + 4 * (ascent - g)), rtol=1e-7, atol=0)


@pytest.mark.parametrize('name', sorted(registry))
def test_watching_changes_no_bit(name: str) -> None:
    ends = []
    for watched in (False, True):
        torch.manual_seed(3)
        model = network()
        optimizer = SharpnessAwareOptimizer(BASES['AdamW'](model.parameters()), registry[name](interval=2), model)
        seen: list[Any] = []
        if watched:
            optimizer.observer = lambda g, d, seen=seen: seen.append(gradient_geometry(g, d))
        for batch in batches(6):
            optimizer.step(Closure(model, batch, graph=needs_graph(name)))
        assert len(seen) == watched * sum(optimizer.method.perturbs(Moment(step)) for step in range(6))
        ends.append(snapshot(model, optimizer))
    assert same(*ends)


def test_vectors_without_elements_in_common() -> None:
    parameters = [nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([1.0, 2.0]))]
    layout = Layout(parameters)
    g = Vector([torch.tensor([3.0, 4.0])], [0], layout)
    d = Vector([torch.tensor([1.0, -2.0])], [1], layout)
    found = gradient_geometry(g, d).as_dict()
    assert found == pytest.approx(
        {'gradient_norm': 5.0, 'direction_norm': 5**0.5, 'cosine': 0.0, 'share_larger': 0.5, 'share_opposite': 0.0}
    )


def test_signs_of_tiny_numbers_count() -> None:
    layout = Layout([nn.Parameter(torch.zeros(2))])
    g = Vector([torch.tensor([1e-30, 1e-30])], [0], layout)
    d = Vector([torch.tensor([-1e-30, 1e-30])], [0], layout)
    assert gradient_geometry(g, d).share_opposite == 0.5


def _trainer(monitor: GradientGeometryMonitor, *algorithms: Any, **settings: Any) -> tuple[Trainer, InMemoryLogger]:
    torch.manual_seed(7)
    model = ComposerClassifier(network(), num_classes=4)
    x, y = (torch.cat(parts) for parts in zip(*batches(8), strict=True))
    logger = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(TensorDataset(x, y), batch_size=12),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        algorithms=list(algorithms),
        callbacks=[monitor],
        loggers=[logger],
        device='cpu',
        seed=3,
        progress_bar=False,
        **{'max_duration': '2ep', **settings},
    )
    return trainer, logger


def _steps(logger: InMemoryLogger) -> list[int]:
    return [timestamp.batch.value for timestamp, _ in logger.data['geometry/cosine']]


@pytest.mark.parametrize(('interval', 'expected'), [(1, [2, 4, 6, 8, 10, 12, 14, 16]), (3, [6, 12])])
def test_the_monitor_logs_perturbed_steps(interval: int, expected: list[int]) -> None:
    trainer, logger = _trainer(GradientGeometryMonitor(interval), SAM(interval=2))
    trainer.fit()
    assert _steps(logger) == expected
    assert {key for key in logger.data if key.startswith('geometry/')} == {f'geometry/{name}' for name in NUMBERS}


def test_the_monitor_s_count_goes_on_after_a_resume(tmp_path: Any) -> None:
    whole, logger = _trainer(GradientGeometryMonitor(3), SAM(), save_folder=str(tmp_path), save_interval='1ba')
    whole.fit()
    resumed, again = _trainer(GradientGeometryMonitor(3), SAM(), load_path=str(tmp_path / 'ep0-ba4-rank0.pt'))
    resumed.fit()
    assert _steps(again) == [step for step in _steps(logger) if step > 4]


def test_the_monitor_without_a_method_is_an_error() -> None:
    trainer, _ = _trainer(GradientGeometryMonitor())
    with pytest.raises(ValueError, match='algorithms='):
        trainer.fit()


@pytest.mark.parametrize('interval', [0, -1, 1.5, True])
def test_bad_intervals(interval: Any) -> None:
    with pytest.raises(ValueError, match='interval'):
        GradientGeometryMonitor(interval)

"""docs/migration.md: the usual lines and ours beside each other, equal where the old ones are right, and otherwise what
they did instead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import composer.algorithms
import pytest
import torch
from composer import Trainer
from composer.algorithms.sam.sam import SAMOptimizer
from composer.models import ComposerClassifier
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as loss_fn
from torch.utils.data import DataLoader, TensorDataset

from composer_sam import GAM, SAM, WSAM, SharpnessAwareOptimizer
from tests.integration.usual_lines import UsualGAM, UsualSAM, UsualWeightedSAM
from tests.problems import BASES, Recorder, batches, network, part

STEPS = 12
OPTIONS: dict[str, dict[str, Any]] = {
    'SGD': {'lr': 0.05, 'momentum': 0.9, 'weight_decay': 1e-2},
    'AdamW': {'lr': 0.01, 'weight_decay': 1e-1},
}
Take = Callable[[Any, nn.Module, Tensor, Tensor], Any]


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def trajectory(make: Callable[[nn.Module], Any], take: Take) -> Tensor:
    """The weights after every step, in fp64 and without dropout, whose masks the old lines draw anew in every pass."""
    model = network(torch.float64, dropout=0.0)
    optimizer = make(model)
    weights = []
    for x, y in batches(STEPS, torch.float64):
        take(optimizer, model, x, y)
        weights.append(vector(model))
    return torch.stack(weights)


def assert_same(left: Tensor, right: Tensor) -> None:
    assert len(left) == STEPS and not torch.equal(left[0], left[-1])
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


def ours(method: Any, base: str) -> Callable[[nn.Module], SharpnessAwareOptimizer]:
    return lambda model: SharpnessAwareOptimizer(BASES[base](model.parameters()), method, model)


def two_steps(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    loss_fn(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    loss_fn(model(x), y).backward()
    optimizer.second_step(zero_grad=True)


def by_closure(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


def backward_then_closure(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    def closure() -> Tensor:
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    loss_fn(model(x), y).backward()
    optimizer.step(closure)
    optimizer.zero_grad()


# The classic SAM.


@pytest.mark.parametrize('adaptive', [False, True])
@pytest.mark.parametrize('base', BASES)
def test_the_classic_sam(base: str, adaptive: bool) -> None:
    def usual(model: nn.Module) -> UsualSAM:
        base_class = {'SGD': torch.optim.SGD, 'AdamW': torch.optim.AdamW}[base]
        return UsualSAM(model.parameters(), base_class, rho=0.1, adaptive=adaptive, **OPTIONS[base])

    ours_of = ours(SAM(rho=0.1, adaptive=adaptive), base)
    left = trajectory(usual, two_steps)
    assert_same(left, trajectory(ours_of, two_steps))
    assert_same(left, trajectory(ours_of, by_closure))
    # The old closure wants a backward before step; ours does not, and an old one before it does no harm.
    assert_same(left, trajectory(usual, backward_then_closure))
    assert_same(left, trajectory(ours_of, backward_then_closure))


def drifted(make: Callable[[nn.Module], Any], take: Take) -> float:
    """The part of the weights that 32 steps at lr 0, which should change none, have changed."""
    model = network(dropout=0.0)
    optimizer = make(model)
    before = vector(model)
    for x, y in batches(32):
        take(optimizer, model, x, y)
    return float((vector(model) != before).double().mean())


def test_weights_restored_by_subtraction_drift() -> None:
    def base(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.0)

    assert drifted(lambda model: UsualSAM(model.parameters(), torch.optim.SGD, lr=0.0), two_steps) > 0.1
    assert drifted(lambda model: UsualWeightedSAM(model, base(model)), by_closure) > 0.1
    assert drifted(lambda model: UsualGAM(model.parameters(), base(model), model, GAM()), set_closure) > 0.1
    for method in (SAM(), WSAM(), GAM()):
        assert (
            drifted(lambda model, method=method: SharpnessAwareOptimizer(base(model), method, model), by_closure) == 0
        )


def resumed(make: Callable[[nn.Module], Any], take: Take) -> tuple[Tensor, set[str]]:
    """The end of a run that is saved and loaded half-way, and the names of what was saved for each parameter."""
    model = network(torch.float64, dropout=0.0)
    optimizer = make(model)
    data = batches(STEPS, torch.float64)
    for number, (x, y) in enumerate(data):
        if number == STEPS // 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = make(model)
            optimizer.load_state_dict(saved)
        take(optimizer, model, x, y)
    return vector(model), {key for state in saved['state'].values() for key in state}


def test_a_checkpoint_of_the_old_sam_and_wsam_has_no_momentum() -> None:
    options = OPTIONS['SGD']
    usual: list[tuple[Callable[[nn.Module], Any], Take, set[str]]] = [
        (lambda model: UsualSAM(model.parameters(), torch.optim.SGD, **options), two_steps, {'e_w'}),
        (
            lambda model: UsualWeightedSAM(model, BASES['SGD'](model.parameters())),
            by_closure,
            {'e_w', 'grad', 'sharpness'},
        ),
    ]
    for make, take, expected in usual:
        end, keys = resumed(make, take)
        assert keys == expected
        assert (end - trajectory(make, take)[-1]).norm() > 1e-2
    for method in (SAM(), WSAM(), GAM()):
        end, keys = resumed(ours(method, 'SGD'), by_closure)
        assert keys == {'momentum_buffer'}
        assert torch.equal(end, trajectory(ours(method, 'SGD'), by_closure)[-1])


# WeightedSAM.


@pytest.mark.parametrize('max_norm', [None, 0.5])
@pytest.mark.parametrize('decouple', [True, False])
@pytest.mark.parametrize('base', BASES)
def test_weighted_sam(base: str, decouple: bool, max_norm: float | None) -> None:
    values: dict[str, Any] = {'rho': 0.1, 'gamma': 0.8, 'decouple': decouple, 'max_norm': max_norm}
    ours_of = ours(WSAM(**values), base)

    def usual(model: nn.Module) -> UsualWeightedSAM:
        return UsualWeightedSAM(model, BASES[base](model.parameters()), **values)

    left = trajectory(usual, by_closure)
    assert_same(left, trajectory(ours_of, by_closure))
    assert_same(left, trajectory(usual, two_steps))
    assert_same(left, trajectory(ours_of, two_steps))


def test_a_backward_before_the_closure_doubles_the_first_gradient_of_weighted_sam() -> None:
    def first_gradient(make: Callable[[nn.Module, torch.optim.Optimizer], Any], take: Take) -> Tensor:
        model = network(torch.float64, dropout=0.0)
        recorder = Recorder(model.parameters())
        ((x, y),) = batches(1, torch.float64)
        take(make(model, recorder), model, x, y)
        (direction,) = recorder.directions
        return torch.cat([g.reshape(-1) for g in direction if g is not None])

    def wsam(model: nn.Module, base: torch.optim.Optimizer) -> SharpnessAwareOptimizer:
        return SharpnessAwareOptimizer(base, WSAM(), model)

    right = first_gradient(UsualWeightedSAM, by_closure)
    torch.testing.assert_close(first_gradient(UsualWeightedSAM, backward_then_closure), 2 * right, rtol=1e-12, atol=0)
    torch.testing.assert_close(first_gradient(wsam, backward_then_closure), right, rtol=1e-12, atol=0)


# GAM.


def set_closure(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    optimizer.set_closure(loss_fn, x, y)
    return optimizer.step()


def by_loop(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    first: list[Tensor] = []
    for number in optimizer.passes():
        optimizer.zero_grad()
        outputs = model(x)
        loss = loss_fn(outputs, y)
        loss.backward()
        if number == 0:
            first = [outputs.detach(), loss.detach()]
    return first[0], first[1]


VALUES: dict[str, Any] = {
    'grad_rho': 0.03,
    'grad_norm_rho': 0.2,
    'grad_beta_1': 0.1,
    'grad_beta_2': 0.9,
    'grad_beta_3': 0.9,
    'grad_gamma': 0.05,
}


@pytest.mark.parametrize('base', BASES)
def test_gam(base: str) -> None:
    def usual(model: nn.Module) -> UsualGAM:
        return UsualGAM(model.parameters(), BASES[base](model.parameters()), model, SimpleNamespace(**VALUES))

    left = trajectory(usual, set_closure)
    assert_same(left, trajectory(ours(GAM(**VALUES), base), by_closure))
    assert_same(left, trajectory(ours(GAM(**VALUES), base), by_loop))


def test_gam_returns_what_set_closure_did_and_counts_a_batch_once() -> None:
    ((x, y),) = batches(1, torch.float64)
    found = {}
    makers: dict[str, tuple[Callable[[nn.Module], Any], Take]] = {
        'usual': (lambda m: UsualGAM(m.parameters(), BASES['SGD'](m.parameters()), m, GAM()), set_closure),
        'ours': (ours(GAM(), 'SGD'), by_loop),
    }
    for name, (make, take) in makers.items():
        model = network(torch.float64, dropout=0.0)
        outputs, loss = take(make(model), model, x, y)
        norm = part(model, '1', nn.BatchNorm1d)
        found[name] = [outputs.detach(), loss, norm.running_mean, norm.running_var]
        assert norm.num_batches_tracked == {'usual': 4, 'ours': 1}[name]
    for left, right in zip(found['usual'], found['ours'], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=0)


# Composer's SAM.


def composer_run(algorithm: Any) -> tuple[Tensor, Trainer]:
    module = network(torch.float64, dropout=0.0)
    x, y = (torch.cat(parts) for parts in zip(*batches(STEPS, torch.float64), strict=True))
    trainer = Trainer(
        model=ComposerClassifier(module, num_classes=4),
        train_dataloader=DataLoader(TensorDataset(x, y), batch_size=12),
        optimizers=BASES['SGD'](module.parameters()),
        algorithms=[algorithm],
        max_duration='1ep',
        device='cpu',
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return vector(module), trainer


@pytest.mark.parametrize('interval', [1, 3])
def test_composers_sam(interval: int) -> None:
    left, usual = composer_run(composer.algorithms.SAM(rho=0.1, interval=interval))
    right, trainer = composer_run(SAM(rho=0.1, interval=interval))
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)
    perturbed = STEPS // interval
    counted = [part(t.state.model, 'module.1', nn.BatchNorm1d).num_batches_tracked for t in (usual, trainer)]
    assert counted == [STEPS + perturbed, STEPS]
    saved = [t.state.optimizers[0].state_dict()['state'].values() for t in (usual, trainer)]
    assert [{key for state in states for key in state} for states in saved] == [{'e_w'}, {'momentum_buffer'}]


def test_composers_sam_takes_a_loss_of_zero_for_an_overflow() -> None:
    moved = []
    for wrap in (lambda base: SAMOptimizer(base, rho=0.1), lambda base: SharpnessAwareOptimizer(base, SAM(rho=0.1))):
        weight = nn.Parameter(torch.zeros(3))
        optimizer = wrap(torch.optim.SGD([weight], lr=1.0))

        def closure(weight: Tensor = weight, optimizer: Any = optimizer, **options: Any) -> Tensor:
            optimizer.zero_grad()
            loss = weight.sum()  # 0, with a gradient of 1
            loss.backward()
            return loss

        optimizer.step(closure)
        moved.append(weight.detach().clone())
    assert torch.equal(moved[0], torch.zeros(3))
    assert torch.equal(moved[1], -torch.ones(3))


def test_the_interval_of_composers_sam_starts_anew_after_a_resume() -> None:
    passes: dict[str, list[int]] = {'usual': [], 'ours': []}
    for name, counts in passes.items():
        weight = nn.Parameter(torch.ones(2))
        base = torch.optim.SGD([weight], lr=0.1)
        make = {
            'usual': lambda b: SAMOptimizer(b, interval=3),
            'ours': lambda b: SharpnessAwareOptimizer(b, SAM(interval=3)),
        }
        optimizer: Any = make[name](base)
        for number in range(6):
            if number == 2:
                optimizer = make[name](base)
                if name == 'ours':
                    optimizer.steps_taken = number  # a Trainer's timestamp does this
            counts.append(0)

            def closure(weight: Tensor = weight, counts: list[int] = counts, **options: Any) -> Tensor:
                counts[-1] += 1
                weight.grad = None
                loss = weight.square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
    assert passes == {'usual': [1, 1, 1, 1, 2, 1], 'ours': [1, 1, 2, 1, 1, 2]}

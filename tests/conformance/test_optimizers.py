"""Every method around every kind of group and parameter; checkpoints, copies and the right passes."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import nn

from composer_sam import SAM, SharpnessAwareOptimizer, registry
from tests.conformance.parts import METHODS
from tests.problems import (
    BASES,
    Closure,
    Recorder,
    batches,
    gradient,
    made,
    needs_graph,
    network,
    part,
    same,
    snapshot,
    with_all_passes,
)


def _moves(direction: torch.Tensor | None) -> bool:
    return direction is not None and bool(direction.norm() > 0)


def test_lbfgs_is_refused_and_sparse_gradients_are_named() -> None:
    model = network()
    with pytest.raises(ValueError, match='LBFGS evaluates its closure several times'):
        SharpnessAwareOptimizer(torch.optim.LBFGS(model.parameters()), SAM())
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = SharpnessAwareOptimizer(torch.optim.SparseAdam(embedding.parameters()), SAM())
    before = embedding.weight.clone()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = embedding(torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match='torch.sparse_coo'):
        optimizer.step(closure)
    assert torch.equal(before, embedding.weight)
    assert embedding.weight.grad is None


@pytest.mark.parametrize('name', METHODS)
def test_the_closure_is_called_once_a_pass_and_the_first_loss_is_returned(name: str) -> None:
    model = network()
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), with_all_passes(name), model)
    closure = Closure(model, batches(1)[0], graph=needs_graph(name))
    loss = optimizer.step(closure)
    assert closure.calls == optimizer.method.passes
    assert loss is not None and loss.item() == closure.losses[0]


@pytest.mark.parametrize('name', METHODS)
def test_a_loss_of_exactly_zero_is_a_loss(name: str) -> None:
    model = network(dropout=0.0)
    base = Recorder(model.parameters())
    optimizer = SharpnessAwareOptimizer(base, with_all_passes(name), model)
    inner = Closure(model, batches(1)[0], graph=needs_graph(name))

    def closure() -> float:
        inner()
        return 0.0

    assert optimizer.step(closure) == 0.0
    assert inner.calls == optimizer.method.passes
    assert len(base.directions) == 1
    assert optimizer.steps_taken == 1


@pytest.mark.parametrize('name', METHODS)
def test_interval_perturbs_every_kth_step_and_leaves_the_others_to_the_base(name: str) -> None:
    plain, sharp = network(), network()
    base = BASES['SGD'](plain.parameters())
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](sharp.parameters()), with_all_passes(name, interval=3), sharp)
    data = batches(7)
    calls = []
    torch.manual_seed(0)
    for batch in data:
        closure = Closure(sharp, batch, graph=needs_graph(name))
        optimizer.step(closure)
        calls.append(closure.calls)
        if len(calls) == 2:
            after_two = copy.deepcopy(list(sharp.parameters()))
    passes = optimizer.method.passes
    assert calls == [1, 1, passes, 1, 1, passes, 1]
    torch.manual_seed(0)
    for batch in data[:2]:
        Closure(plain, batch, graph=needs_graph(name))()
        base.step()
    assert same(list(plain.parameters()), after_two)


@pytest.mark.parametrize('name', METHODS)
def test_start_and_end_bound_the_perturbed_steps(name: str) -> None:
    model = network()
    method = with_all_passes(name, start='2ba', end='4ba')
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), method, model)
    calls = []
    for batch in batches(6):
        closure = Closure(model, batch, graph=needs_graph(name))
        optimizer.step(closure)
        calls.append(closure.calls)
    assert [count > 1 for count in calls] == [False, False] + [method.passes > 1] * 2 + [False, False]


@pytest.mark.parametrize('name', METHODS)
def test_frozen_parameters_and_parameters_without_gradient(name: str) -> None:
    calls: list[int] = []

    class Branches(nn.Module):
        """A parameter that takes part in the first pass only, one in later passes only, one never, one frozen."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.trunk, self.first, self.later, self.never, self.frozen = (nn.Linear(4, 4) for _ in range(5))
            self.frozen.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)  # outside of the module, where nothing is put back between passes
            branch = self.first if len(calls) == 1 else self.later
            return self.frozen(branch(torch.tanh(self.trunk(x))))

    model = Branches()
    base = Recorder(model.parameters())
    optimizer = SharpnessAwareOptimizer(base, made(name), model)
    before = copy.deepcopy(model.state_dict())
    batch = (torch.randn(6, 4), torch.randint(4, (6,)))
    optimizer.step(Closure(model, batch, graph=needs_graph(name)))
    assert same(before, model.state_dict())
    directions = dict(zip((n for n, _ in model.named_parameters()), base.directions[0], strict=True))
    assert _moves(directions['trunk.weight'])
    assert all(directions[f'{unused}.weight'] is None for unused in ('never', 'frozen'))
    if name == 'SAM':
        assert directions['first.weight'] is None and _moves(directions['later.weight'])


def test_groups_have_their_own_rho_and_epsilon_under_one_norm() -> None:
    model = network(torch.float64, dropout=0.0)
    first, second = model[:3], model[3:]
    groups = [{'params': list(first.parameters()), 'rho': 0.3}, {'params': list(second.parameters()), 'epsilon': 0.5}]
    base = Recorder(groups)
    optimizer = SharpnessAwareOptimizer(base, SAM(rho=0.1), model)
    batch = batches(1, torch.float64)[0]
    Closure(model, batch)()
    grads = [gradient(p).clone() for p in model.parameters()]
    length = torch.cat([g.reshape(-1) for g in grads]).norm()
    count = len(list(first.parameters()))
    expected = network(torch.float64, dropout=0.0)
    with torch.no_grad():
        for i, (p, g) in enumerate(zip(expected.parameters(), grads, strict=True)):
            p += (0.3 / (length + 1e-12) if i < count else 0.1 / (length + 0.5)) * g
    Closure(expected, batch)()
    optimizer.step(Closure(model, batch))
    for found, parameter in zip(base.directions[0], expected.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-10, atol=1e-14)


def test_a_key_of_the_base_optimizer_is_not_taken_for_the_methods() -> None:
    """Adadelta has a rho of its own, 0.9."""
    results = []
    for rho in (0.9, 0.5):
        model = network(dropout=0.0)
        optimizer = SharpnessAwareOptimizer(torch.optim.Adadelta(model.parameters(), rho=rho), SAM(rho=0.05), model)
        perturbed = []
        first = part(model, '0', nn.Linear)
        first.register_forward_hook(
            lambda *_, weight=first.weight, into=perturbed: into.append(weight.detach().clone())
        )
        optimizer.step(Closure(model, batches(1)[0]))
        results.append(perturbed[1])
    assert torch.equal(*results)


@pytest.mark.parametrize('rho', [-1.0, 0.0, float('nan'), 'big', True])
def test_a_groups_value_out_of_range_is_refused_before_training(rho: Any) -> None:
    model = network()
    with pytest.raises(ValueError, match='rho of a parameter group must be a finite number > 0, got'):
        SharpnessAwareOptimizer(torch.optim.SGD([{'params': list(model.parameters()), 'rho': rho}], lr=0.1), SAM())


@pytest.mark.parametrize('on_wrapper', [True, False])
def test_lr_schedulers_work_on_the_wrapper_and_on_the_base(on_wrapper: bool, recwarn: pytest.WarningsRecorder) -> None:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SharpnessAwareOptimizer(base, SAM(), model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer if on_wrapper else base, 1, gamma=0.5)
    for batch in batches(3):
        optimizer.step(Closure(model, batch))
        scheduler.step()
    assert optimizer.param_groups[0]['lr'] == base.param_groups[0]['lr'] == 0.1 * 0.5**3
    for _ in optimizer.passes():
        Closure(model, batches(1)[0])()
    scheduler.step()
    assert optimizer.param_groups[0]['lr'] == 0.1 * 0.5**4
    assert not [w for w in recwarn if 'lr_scheduler.step()' in str(w.message)]
    copied_model, copied = copy.deepcopy((model, optimizer))
    before = copy.deepcopy(copied_model.state_dict())
    copied.step(Closure(copied_model, batches(1)[0]))
    assert not same(before, copied_model.state_dict())


@pytest.mark.parametrize('name', METHODS)
def test_a_vanishing_radius_gives_the_plain_direction(name: str) -> None:
    """Also in the second step, of another batch, where there is a momentum or memory to perturb along."""
    model = network(torch.float64, dropout=0.0)
    base = Recorder(model.parameters())
    own: dict[str, Any] = {
        field: 1e-9 for field in ('rho', 'grad_rho', 'grad_norm_rho') if hasattr(registry[name], field)
    }
    # FisherSAM's radius has another name; SAGM steps back beside the radius.
    own |= {'FisherSAM': {'gamma': 1e-9}, 'SAGM': {'alpha': 0.0}}.get(name, {})
    assert own
    optimizer = SharpnessAwareOptimizer(base, with_all_passes(name, **own), model)
    for batch in batches(2, torch.float64):
        optimizer.step(Closure(model, batch, graph=needs_graph(name)))
    Closure(model, batches(2, torch.float64)[1], graph=needs_graph(name))()
    found = torch.cat([d.reshape(-1) for d in base.directions[1] if d is not None])
    plain = torch.cat([gradient(p).reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(found / found.norm(), plain / plain.norm(), rtol=1e-6, atol=1e-8)


def test_a_zero_gradient_moves_nothing_even_without_epsilon() -> None:
    model = nn.Linear(3, 2)
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SAM(epsilon=0.0), model)
    before = copy.deepcopy(model.state_dict())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.0 * model(torch.ones(1, 3)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert same(before, model.state_dict())


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    weight = nn.Parameter(torch.tensor([1 + 2j, -0.5 + 1j]))
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD([weight], lr=0.1), SAM(rho=0.5))
    seen = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        seen.append(weight.detach().clone())
        loss = (weight.abs() ** 4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(torch.linalg.vector_norm(seen[1] - seen[0]), torch.tensor(0.5))
    assert not torch.equal(weight, seen[0])


def test_gradients_left_by_an_earlier_backward_are_not_added() -> None:
    """Calling backward before step(closure) must not double the gradient, whatever the closure zeroes."""
    results = []
    for left_over in (True, False):
        model = network(dropout=0.0)
        optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SAM(), model)
        x, y = batches(1)[0]

        def closure(model: nn.Module = model, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            loss = nn.functional.cross_entropy(model(x), y)  # zeroes nothing
            loss.backward()
            return loss

        if left_over:
            next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
        optimizer.step(closure)
        results.append(list(model.parameters()))
    assert same(*results)


def test_step_without_closure_and_closures_without_loss_are_errors() -> None:
    model = network()
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SAM(), model)
    before = snapshot(model, optimizer)
    inner = Closure(model, batches(1)[0])
    for missing in (lambda: optimizer.step(), lambda: optimizer.step(None), lambda: optimizer.step(closure=None)):
        with pytest.raises(ValueError, match='needs a closure .* SAM evaluates it 2 times'):
            missing()
    with pytest.raises(ValueError, match='the closure returned None'):
        optimizer.step(lambda: [inner(), None][1])
    assert same(before, snapshot(model, optimizer))


def test_wrapping_twice_and_wrong_types_are_errors() -> None:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r'wrapped already, with SAM\('):
        SharpnessAwareOptimizer(SharpnessAwareOptimizer(base, SAM()), SAM())
    with pytest.raises(TypeError, match='must be a torch.optim.Optimizer'):
        SharpnessAwareOptimizer(cast(Any, model), SAM())
    with pytest.raises(TypeError, match="one of composer_sam's methods"):
        SharpnessAwareOptimizer(base, cast(Any, 0.05))
    with pytest.raises(ValueError, match=r"start='0.5dur' needs a Composer Trainer .* '500ba'"):
        SharpnessAwareOptimizer(base, SAM(start='0.5dur'))


def test_distributed_checkpoint_can_make_a_fresh_optimizers_state() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = network()
    optimizer = SharpnessAwareOptimizer(BASES['AdamW'](model.parameters()), SAM(), model)
    before = copy.deepcopy(list(model.parameters()))
    state = get_optimizer_state_dict(model, optimizer)
    assert state['state']
    assert same(before, list(model.parameters()))


@pytest.mark.parametrize('name', METHODS)
def test_a_closure_without_backward_is_an_error(name: str) -> None:
    model = network()
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), made(name), model)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r'the closure must call backward\(\)'):
        optimizer.step(lambda: model(batches(1)[0][0]).sum())
    assert same(before, snapshot(model, optimizer))


@pytest.mark.parametrize('on_wrapper', [True, False])
@pytest.mark.parametrize('name', METHODS)
def test_a_scheduler_does_not_warn_at_its_first_step(
    name: str, on_wrapper: bool, recwarn: pytest.WarningsRecorder
) -> None:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SharpnessAwareOptimizer(base, made(name), model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer if on_wrapper else base, 1, gamma=0.5)
    for _ in optimizer.passes():
        Closure(model, batches(1)[0], graph=needs_graph(name))()
    scheduler.step()
    assert not [w for w in recwarn if 'lr_scheduler.step()' in str(w.message)]

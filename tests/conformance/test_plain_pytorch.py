"""Without a trainer: a closure, a loop over passes and two calls end in the same bits; fp16; order and early exits."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from composer_sam import SAM, SGDHess, SharpnessAwareOptimizer, registry
from tests.conformance.parts import METHODS
from tests.problems import (
    ALONG_THE_STEP_BEFORE,
    BASES,
    TWO_CALLS,
    batches,
    gradient,
    made,
    needs_graph,
    network,
    same,
    snapshot,
    with_all_passes,
)

Drive = Callable[[SharpnessAwareOptimizer, nn.Module, Any, torch.amp.GradScaler, bool], None]


def backward(model: nn.Module, batch: Any, scaler: torch.amp.GradScaler, graph: bool) -> torch.Tensor:
    x, y = batch
    with torch.autocast('cpu', torch.float16, enabled=scaler.is_enabled()):
        loss = nn.functional.cross_entropy(model(x), y)
    scaler.scale(loss).backward(create_graph=graph)
    return loss


def by_closure(optimizer, model, batch, scaler, graph) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return backward(model, batch, scaler, graph)

    optimizer.step(closure)


def by_loop(optimizer, model, batch, scaler, graph) -> None:
    for _ in optimizer.passes():
        optimizer.zero_grad()
        backward(model, batch, scaler, graph)


def by_two_calls(optimizer, model, batch, scaler, graph) -> None:
    backward(model, batch, scaler, graph)
    optimizer.first_step(zero_grad=True)
    backward(model, batch, scaler, graph)
    optimizer.second_step(zero_grad=True)


def trajectory(name: str, drive: Drive, half: bool = False, **values: Any) -> dict[str, Any]:
    model = network(dropout=0.4)
    scaler = torch.amp.GradScaler('cpu', init_scale=256.0, growth_interval=4, enabled=half)
    optimizer = SharpnessAwareOptimizer(BASES['AdamW'](model.parameters()), made(name, **values), model, scaler)
    torch.manual_seed(7)
    for batch in batches(9):
        drive(optimizer, model, batch, scaler, needs_graph(name))
        scaler.update()
    return {**snapshot(model, optimizer), 'scale': scaler.get_scale()}


@pytest.mark.parametrize('half', [False, True], ids=['fp32', 'fp16'])
@pytest.mark.parametrize('interval', [1, 3])
@pytest.mark.parametrize('name', METHODS)
def test_all_ways_to_take_a_step_end_in_the_same_bits(name: str, interval: int, half: bool) -> None:
    if half and needs_graph(name):
        with pytest.raises(ValueError, match='SGDHess takes no grad_scaler'):
            trajectory(name, by_closure, half)
        return
    expected = trajectory(name, by_closure, half, interval=interval)
    assert same(expected, trajectory(name, by_loop, half, interval=interval))
    if name in TWO_CALLS:
        assert same(expected, trajectory(name, by_two_calls, half, interval=interval))
    if half:
        assert expected['scale'] == 1024.0  # nine steps, not passes, of growth interval four


def test_two_calls_on_a_plain_step_use_the_first_gradient() -> None:
    ends = []
    for drive in (by_closure, by_two_calls):
        model = network(dropout=0.0)
        scaler = torch.amp.GradScaler('cpu', enabled=False)
        optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SAM(interval=2), model)
        for batch in batches(4):
            drive(optimizer, model, batch, scaler, False)
        ends.append(list(model.parameters()))
    assert same(*ends)


@pytest.mark.parametrize('drive', [by_closure, by_loop, by_two_calls])
@pytest.mark.parametrize('index', [1, 2])
def test_an_overflow_in_any_pass_skips_the_step_and_backs_off_once(drive: Drive, index: int) -> None:
    model = network(dropout=0.0)
    scaler = torch.amp.GradScaler('cpu', init_scale=256.0)
    optimizer = SharpnessAwareOptimizer(BASES['AdamW'](model.parameters()), SAM(), model, scaler)
    first, second = batches(2)
    drive(optimizer, model, first, scaler, False)
    scaler.update()
    before = snapshot(model, optimizer)
    calls = 0

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return gradient * float('inf') if calls == index else gradient

    handle = next(model.parameters()).register_hook(poison)
    drive(optimizer, model, second, scaler, False)
    handle.remove()
    assert optimizer.skipped
    scaler.update()
    assert scaler.get_scale() == 128.0
    after = snapshot(model, optimizer)
    assert same(before['optimizer'], after['optimizer']) and before['steps'] == after['steps'] == 1
    assert all(same(before['model'][n], after['model'][n]) for n, _ in model.named_parameters())
    drive(optimizer, model, second, scaler, False)
    assert not optimizer.skipped and optimizer.steps_taken == 2


@pytest.mark.parametrize('name', METHODS)
def test_micro_batches_in_the_loop_are_the_whole_batch(name: str) -> None:
    ends = []
    for pieces in (1, 3):
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), made(name), model)
        for x, y in batches(4, torch.float64):
            for _ in optimizer.passes():
                optimizer.zero_grad()
                for xs, ys in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                    loss = nn.functional.cross_entropy(model(xs), ys) / pieces
                    loss.backward(create_graph=needs_graph(name))
        ends.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('how', ['break', 'error'])
@pytest.mark.parametrize('name', METHODS)
def test_leaving_the_loop_in_any_pass_takes_the_step_back(name: str, how: str) -> None:
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    for index in range(made(name).passes):
        model = network()
        optimizer = SharpnessAwareOptimizer(BASES['AdamW'](model.parameters()), with_all_passes(name), model)
        first, second = batches(2)
        by_loop(optimizer, model, first, scaler, needs_graph(name))
        before = snapshot(model, optimizer)
        with pytest.raises(KeyError) if how == 'error' else contextlib.nullcontext():
            for number in optimizer.passes():
                assert optimizer.pass_index == number
                optimizer.zero_grad()
                backward(model, second, scaler, needs_graph(name))
                if number == index and how == 'break':
                    break
                if number == index:
                    raise KeyError('in the loop')
        assert same(before, snapshot(model, optimizer))
        assert optimizer.pass_index == -1
        by_loop(optimizer, model, second, scaler, needs_graph(name))
        assert optimizer.steps_taken == 2


def test_calls_out_of_order_name_the_one_that_was_missed() -> None:
    model = network()
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SAM(), model)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    batch = batches(1)[0]
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r'first_step\(\) is missing'):
        optimizer.second_step()
    with pytest.raises(ValueError, match=r'backward\(\) is missing before first_step\(\)'):
        optimizer.first_step()
    assert same(before, snapshot(model, optimizer))
    backward(model, batch, scaler, False)
    optimizer.first_step(zero_grad=True)
    assert not same(before['model']['0.weight'], model[0].weight)
    for again in (optimizer.first_step, lambda: optimizer.step(lambda: None), lambda: list(optimizer.passes())):
        with pytest.raises(ValueError, match=r'second_step\(\) is missing'):
            again()
    with pytest.raises(ValueError, match=r'backward\(\) is missing before second_step\(\)'):
        optimizer.second_step()
    assert same(before, snapshot(model, optimizer))
    backward(model, batch, scaler, False)
    optimizer.first_step()
    optimizer.abandon_step()
    assert same(before, snapshot(model, optimizer))


def test_abandoning_a_plain_step_takes_back_what_its_forwards_drew_and_counted() -> None:
    model = network(dropout=0.4)
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SAM(interval=2), model)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    before = snapshot(model, optimizer)
    backward(model, batches(1)[0], scaler, False)
    optimizer.first_step(zero_grad=True)
    backward(model, batches(1)[0], scaler, False)
    optimizer.abandon_step()
    assert same(before, snapshot(model, optimizer))


def test_first_step_leaves_the_gradient_if_it_is_not_to_be_zeroed() -> None:
    model = network(dropout=0.0)
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SAM(), model)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    backward(model, batches(1)[0], scaler, False)
    gradients = [gradient(p).clone() for p in model.parameters()]
    optimizer.first_step()
    assert same(gradients, [p.grad for p in model.parameters()])
    optimizer.zero_grad()
    backward(model, batches(1)[0], scaler, False)
    optimizer.second_step()
    assert all(p.grad is not None for p in model.parameters())


REFUSALS = {
    'GAM': 'GAM takes 4 passes, not the two of first_step',
    'CRSAM': 'CRSAM takes 3 passes',
    **{name: f'{name} takes 1 pass' for name in ('MSAM', 'DPSAT', 'SGDHess')},
    **{name: f'{name} takes one or two passes' for name in ('LookSAM', 'AESAM', 'RandomSAM')},
    'FunctionalSAM': 'FunctionalSAM watches the outputs of the first forward, which is over',
}


def test_every_method_can_be_driven_by_two_calls_or_refuses_them() -> None:
    assert sorted([*REFUSALS, *TWO_CALLS]) == METHODS


@pytest.mark.parametrize('name', REFUSALS)
def test_methods_of_other_than_two_passes_refuse_the_two_calls(name: str) -> None:
    model = network()
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), made(name), model)
    before = snapshot(model, optimizer)
    backward(model, batches(1)[0], torch.amp.GradScaler('cpu', enabled=False), needs_graph(name))
    with pytest.raises(ValueError, match=REFUSALS[name]) as found:
        optimizer.first_step()
    assert str(found.value).endswith('use step(closure) or passes()')
    assert same(before['optimizer'], optimizer.state_dict())


def test_the_watched_model_can_be_copied_and_saved(tmp_path) -> None:
    model = network()
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SAM(), model)
    copied = copy.deepcopy(model)
    copied(batches(1)[0][0])
    torch.save(model, tmp_path / 'model.pt')
    loaded = torch.load(tmp_path / 'model.pt', weights_only=False)
    loaded(batches(1)[0][0])
    by_two_calls(optimizer, model, batches(1)[0], torch.amp.GradScaler('cpu', enabled=False), False)
    assert optimizer.steps_taken == 1


@pytest.mark.parametrize(
    ('selection', 'moved'),
    [
        ('normalization', {'1.weight', '1.bias'}),
        ('bias', {'1.bias', '4.bias', '6.bias'}),
        (lambda name, parameter: parameter.dim() == 2 and name != '0.weight', {'4.weight', '6.weight'}),
    ],
    ids=['normalization', 'expression', 'predicate'],
)
@pytest.mark.parametrize('name', [name for name in METHODS if name != 'SGDHess'])
def test_only_the_chosen_parameters_are_perturbed(name: str, selection: Any, moved: set[str]) -> None:
    model = network(dropout=0.0)
    method = with_all_passes(name, parameters=selection)
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), method, model)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    if name in ALONG_THE_STEP_BEFORE:
        by_loop(optimizer, model, batches(1)[0], scaler, False)
    before = copy.deepcopy(dict(model.named_parameters()))
    offsets = []
    for _ in optimizer.passes():
        offsets.append({n: (p - before[n]).detach() for n, p in model.named_parameters()})
        optimizer.zero_grad()
        backward(model, batches(1)[0], scaler, False)
    for number, of_pass in enumerate(offsets):
        perturbed = number > 0 or name in ALONG_THE_STEP_BEFORE
        assert {n for n, offset in of_pass.items() if offset.any()} == (moved if perturbed else set()), number
    if name == 'SAM':  # the radius is that of the chosen ones
        length = torch.cat([o.reshape(-1) for o in offsets[1].values()]).norm()
        torch.testing.assert_close(length, torch.tensor(0.05), rtol=1e-4, atol=0)
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())  # all got the direction


def test_a_selection_that_chooses_nothing_or_has_no_names_is_an_error() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="parameters='attention' chooses no parameter; their names are 0.weight"):
        SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SAM(parameters='attention'), model)
    with pytest.raises(ValueError, match='needs the names of parameters: pass model='):
        SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SAM(parameters='bias'))
    with pytest.raises(ValueError, match='parameters must be a regular expression'):
        SAM(parameters='(')
    assert same(before, model.state_dict())


@pytest.mark.parametrize(
    ('name', 'key'), [(name, key) for name in METHODS for key in ('rho', 'grad_rho', 'grad_norm_rho')
                      if hasattr(registry[name], key)]
)  # fmt: skip
def test_a_schedule_multiplies_the_radius(name: str, key: str) -> None:
    """A schedule that is 0.5 at every step gives the trajectory of half the radius, and 0 is allowed."""
    ends = []
    default = getattr(made(name), key)
    settings: list[dict[str, Any]] = [
        {key: default / 2},
        {'schedules': {key: lambda time: 0.5 if time.batch < 100 else 1.0}},
        {'schedules': {key: lambda time: 0.0}},
    ]
    for values in settings:
        model = network(dropout=0.0)
        optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), with_all_passes(name, **values), model)
        for batch in batches(3):
            by_loop(optimizer, model, batch, torch.amp.GradScaler('cpu', enabled=False), needs_graph(name))
        ends.append(list(model.parameters()))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


@pytest.mark.parametrize(
    ('schedules', 'message'),
    [
        ({'roh': lambda time: 1.0}, "schedules has no hyper-parameter 'roh' to follow: SAM has rho, epsilon"),
        ({'rho': 0.5}, r"schedules\['rho'\] must be a Composer scheduler or a callable"),
    ],
)
def test_bad_schedules_are_named(schedules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAM(schedules=schedules)


def test_a_schedule_out_of_range_fails_with_the_weights_as_they_were() -> None:
    CosineAnnealingScheduler = pytest.importorskip('composer.optim').CosineAnnealingScheduler

    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"the factor of schedules\['rho'\] at step 0 must be a finite number >= 0, got -1"
    ):
        SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SAM(schedules={'rho': lambda time: -1.0}), model)
    with pytest.raises(ValueError, match='is a Composer scheduler, which needs a Composer Trainer'):
        SharpnessAwareOptimizer(
            BASES['SGD'](model.parameters()), SAM(schedules={'rho': CosineAnnealingScheduler()}), model
        )
    assert same(before, model.state_dict())


def test_sgd_hess_needs_a_differentiable_backward_and_leaves_no_graph() -> None:
    import gc

    model = network(dropout=0.0)
    optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SGDHess(), model)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r'call loss.backward\(create_graph=True\)'):
        by_closure(optimizer, model, batches(1)[0], scaler, False)
    assert same(before, snapshot(model, optimizer))

    def tensors() -> int:
        gc.disable()  # a graph kept in a cycle must not be found by luck
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    counts = []
    for step in range(200):
        by_closure(optimizer, model, batches(1)[0], scaler, True)
        if step in (5, 199):
            counts.append(tensors())
    gc.enable()
    assert counts[1] <= counts[0]
    assert all(not gradient(p).requires_grad for p in model.parameters())


def test_the_curvature_of_sgd_hess_is_kept_between_its_steps_and_in_checkpoints() -> None:
    data = batches(7)
    scaler = torch.amp.GradScaler('cpu', enabled=False)

    def run(until: int, resume: Any = None) -> Any:
        model = network(dropout=0.0)
        optimizer = SharpnessAwareOptimizer(BASES['SGD'](model.parameters()), SGDHess(interval_hessian=3), model)
        if resume is not None:
            model.load_state_dict(resume[0])
            optimizer.load_state_dict(resume[1])
            optimizer.steps_taken = resume[2]
        for batch in data[optimizer.steps_taken : until]:
            by_loop(optimizer, model, batch, scaler, True)
        return copy.deepcopy((model.state_dict(), optimizer.state_dict(), optimizer.steps_taken))

    assert same(run(7), run(7, resume=run(5)))

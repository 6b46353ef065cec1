"""Checks on a GPU: captured graphs, compiled models and running out of memory do not change the result."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import optimizer_variants
from benchmarks.report import Table
from benchmarks.workloads import Batches, forced_placement, make_trainer, network
from composer_sam import SAM, SharpnessAwareOptimizer
from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.vectors import add, to_radius

__all__ = ['check_compile', 'check_graphs', 'check_oom']

_STEPS = 8
_BATCH = 64


@dataclass(eq=False)
class BothGradients(SharpnessAware):
    """Reads the first pass's gradient after the second pass, which is wrong if its memory has been written to."""

    def direction(self, step: Step) -> Passes:
        grad = yield Pass()
        ascent_grad = yield Pass(at=to_radius(grad, 0.05))
        return Direction(add(grad, ascent_grad))


METHODS: dict[str, Callable[[], SharpnessAware]] = {'both gradients': BothGradients, **optimizer_variants.METHODS}
# A graph captured by hand keeps no graph of the gradient, and runs no hook on outputs.
CAPTURED = [
    name
    for name, method in METHODS.items()
    if not (method().backwards_create_graph or method().watches_outputs or name == 'SAM')
]


class Run:
    """A model, a batch and an optimizer that always start from the same point."""

    def __init__(self, device: torch.device, method: SharpnessAware, lr: float = 0.05):
        torch.manual_seed(0)
        self.net: Any = network(device)
        self.images = torch.randn(_BATCH if device.type == 'cuda' else 4, 3, 32, 32).to(device)
        self.labels = torch.randint(10, (len(self.images),)).to(device)
        base = torch.optim.SGD(self.net.parameters(), lr=lr, momentum=0.9)
        self.optimizer = SharpnessAwareOptimizer(base, method, self.net)
        self.forward: Callable[[Tensor], Tensor] = self.net

    def backward(self) -> Tensor:
        loss = nn.functional.cross_entropy(self.forward(self.images), self.labels)
        loss.backward()
        return loss.detach()

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        return self.backward()

    def snapshot(self) -> list[Tensor]:
        """Return copies of the weights, buffers, momenta and random streams."""
        state = [v for p in self.net.parameters() for v in self.optimizer.state.get(p, {}).values()]
        streams = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if self.images.is_cuda else [])]
        held = [*self.net.parameters(), *self.net.buffers(), *state, *streams]
        return [v.detach().clone() for v in held if isinstance(v, Tensor)]

    def weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.net.parameters()]).clone()


def _steps(run: Run, closure: Callable[[], Any]) -> tuple[Tensor, float]:
    """Return the weights after the steps, and the seconds per step of the second half."""
    begin = 0.0
    for index in range(_STEPS):
        if index == _STEPS // 2:
            _drain()
            begin = time.perf_counter()
        run.optimizer.step(closure)
    _drain()
    return run.weights(), (time.perf_counter() - begin) / (_STEPS - _STEPS // 2)


def check_graphs(device: torch.device) -> Table:
    """Check a closure that replays one CUDA graph of forward and backward."""
    columns = ('method', 'placement', 'closure', 'largest difference to eager', 'as expected', 'ms', 'eager ms')
    note = (
        'Largest difference of a weight after 8 steps, cuDNN deterministic. Where weights are exchanged the graph goes '
        'on reading their old address, so that row must differ: it shows that the test can see it. A closure that '
        "only replays leaves no .grad behind (the engine has taken it); 'unmoved' means that its steps did nothing."
    )
    table = Table('CUDA graphs captured by hand', columns, note=note)
    if device.type != 'cuda':
        return table
    cases = [
        ('SAM', 'default', 'replay, then sets .grad'),
        *((name, 'default', 'replay, then sets .grad to copies') for name in CAPTURED),
        ('both gradients', 'default', 'replay, then sets .grad'),
        ('SAM', 'exchange', 'replay, then sets .grad'),
        ('SAM', 'default', 'replay only'),
    ]
    with _deterministic():
        for name, placement, kind in cases:
            eager = Run(device, METHODS[name]())
            expected, eager_seconds = _steps(eager, eager.closure)
            try:
                captured = Run(device, METHODS[name]())
                start = captured.weights()
                closure = _captured(captured, kind)
                with forced_placement(placement):
                    weights, seconds = _steps(captured, closure)
            except Exception as error:
                traceback.print_exc()
                table.add(name, placement, kind, f'{type(error).__name__}: {str(error)[:160]}', 'error', '', '')
                continue
            difference = float((weights - expected).abs().max())
            fine = difference > 1e-5 if placement == 'exchange' else difference <= 1e-6
            shown = 'unmoved' if torch.equal(weights, start) else difference
            table.add(name, placement, kind, shown, fine, 1e3 * seconds, 1e3 * eager_seconds)
    return table


def _captured(run: Run, kind: str) -> Callable[[], Tensor]:
    buffers = [buffer.clone() for buffer in run.net.buffers()]
    parameters = list(run.net.parameters())
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run.closure()
    torch.cuda.current_stream().wait_stream(stream)
    run.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run.backward()
    gradients = [p.grad for p in parameters]
    with torch.no_grad():
        for buffer, before in zip(run.net.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def closure() -> Tensor:
        graph.replay()
        if kind != 'replay only':
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone() if gradient is not None and 'copies' in kind else gradient
        return loss.clone()

    return closure


def check_compile(device: torch.device) -> Table:
    """Check torch.compile in its default mode and with CUDA graphs (reduce-overhead)."""
    columns = (
        'mode', 'method', 'placement', 'largest difference', 'of a movement of', 'graphs compiled', 'after step 1',
        'CUDA graphs recorded', 'after step 3', 'ms', 'eager ms',
    )  # fmt: skip
    note = (
        'Difference to eager and movement from the start, of a weight, after 8 steps. Graphs compiled or recorded '
        'after the first steps would be work repeated for every pass: both must be 0, unless weights are exchanged.'
    )
    table = Table('torch.compile', columns, note=note)
    cases = [('default', 'SAM', 'default'), ('reduce-overhead', 'SAM', 'default')]
    cases += [('reduce-overhead', 'both gradients', 'default'), ('reduce-overhead', 'SAM', 'exchange')]
    for mode, name, placement in cases if device.type == 'cuda' else [('default', 'SAM', 'default')]:
        with _deterministic():
            eager = Run(device, METHODS[name]())
            start = eager.weights()
            expected, eager_seconds = _steps(eager, eager.closure)
            torch._dynamo.reset()
            counters = torch._dynamo.utils.counters
            counters.clear()
            run = Run(device, METHODS[name]())
            run.forward = torch.compile(run.net, mode=mode)
            seen: list[tuple[int, int]] = []
            try:
                with _recordings() as recorded, forced_placement(placement):
                    seconds = []
                    for _ in range(_STEPS):
                        begin = time.perf_counter()
                        run.optimizer.step(run.closure)
                        _drain()
                        seconds.append(time.perf_counter() - begin)
                        seen.append((counters['stats']['unique_graphs'], recorded['recorded']))
            except Exception as error:
                traceback.print_exc()
                table.add(mode, name, placement, f'{type(error).__name__}: {str(error)[:160]}', *[''] * 7)
                continue
        difference, movement = (run.weights() - expected).abs().max(), (expected - start).abs().max()
        graphs, recordings = seen[-1]
        after = graphs - seen[0][0], recordings - seen[2][1]
        milliseconds = 1e3 * sorted(seconds)[len(seconds) // 2]
        table.add(
            mode, name, placement, float(difference), float(movement), graphs, after[0], recordings, after[1],
            milliseconds, 1e3 * eager_seconds,
        )  # fmt: skip
    return table


@contextlib.contextmanager
def _recordings() -> Iterator[Counter[str]]:
    """Count the CUDA graphs that torch.compile records."""
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    manager: Any = CUDAGraphTreeManager
    original = manager.record_function
    count: Counter[str] = Counter()

    def recording(*args: Any, **kwargs: Any) -> Any:
        count['recorded'] += 1
        return original(*args, **kwargs)

    manager.record_function = recording
    try:
        yield count
    finally:
        manager.record_function = original


def check_oom(device: torch.device) -> Table:
    """Check that running out of memory in the second pass restores everything, and that the step can be repeated."""
    table = Table('Out of memory in the second pass', ('where', 'check', 'holds'))
    with _deterministic():
        for found in ('forward', 'backward'):
            _check_plain(table, device, found)
        _check_trainer(table, device)
    return table


def _check_plain(table: Table, device: torch.device, found: str) -> None:
    where = f'plain loop, in {found}'
    undisturbed, run = Run(device, SAM(rho=0.05)), Run(device, SAM(rho=0.05))
    for one in (undisturbed, run):
        one.optimizer.step(one.closure)
    before = run.snapshot()
    calls = Counter[str]()

    def closure() -> Tensor:
        calls['passes'] += 1
        if calls['passes'] < 2:
            return run.closure()
        if found == 'forward':
            handle = run.net.fc.register_forward_hook(lambda *_: _exhaust(device))
        else:
            handle = next(run.net.parameters()).register_hook(lambda _: _exhaust(device))
        try:
            return run.closure()
        finally:
            handle.remove()

    raised = ''
    try:
        run.optimizer.step(closure)
    except RuntimeError as error:
        raised = type(error).__name__
    table.add(where, 'the error reaches the caller', raised or False)
    after = run.snapshot()
    same = len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    table.add(where, 'weights, buffers, momenta, random streams bit for bit', same)
    table.add(where, 'no gradients are left', all(p.grad is None for p in run.net.parameters()))
    for one in (undisturbed, run):
        for _ in range(2):
            one.optimizer.step(one.closure)
    table.add(where, 'goes on as an undisturbed run', torch.equal(run.weights(), undisturbed.weights()))


def _check_trainer(table: Table, device: torch.device) -> None:
    """Check that Composer halves the micro-batch and repeats the step."""
    where, size = 'Trainer, automatic micro-batches', 64 if device.type == 'cuda' else 8
    torch.manual_seed(0)
    net: Any = network(device)
    original = net.fc.weight.detach().clone()
    failures = Counter[str]()

    def second_pass(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > size // 4 and not torch.equal(net.fc.weight, original):
            failures['out of memory'] += 1
            _exhaust(device)

    net.fc.register_forward_pre_hook(second_pass)
    batches = Batches(size, 3, (3, 32, 32), device)
    on_gpu = device.type == 'cuda'
    options: dict[str, Any] = {'device_train_microbatch_size': 'auto'} if on_gpu else {}
    trainer = make_trainer(net, batches, [SAM(rho=0.05)], lr=0.0, device=device, **options)
    if not on_gpu:  # the option itself is refused on the CPU
        trainer.state.auto_microbatching = True
        trainer.state.device_train_microbatch_size = size
    before = [p.detach().clone() for p in net.parameters()]
    trainer.fit(duration='3ba')
    table.add(where, 'times out of memory', failures['out of memory'])
    table.add(where, f'micro-batch after it, of {size}', trainer.state.device_train_microbatch_size)
    table.add(where, 'three steps done', trainer.state.timestamp.batch.value == 3)
    same = all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    table.add(where, 'weights bit for bit at lr 0', same)


def _exhaust(device: torch.device) -> None:
    if device.type != 'cuda':
        raise RuntimeError('CUDA out of memory. (an imitation)')
    torch.empty(2**50, dtype=torch.uint8, device=device)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Make runs equal bit for bit: cuDNN's deterministic kernels, no TF32."""
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = True, False, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before


def _drain() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""What several conformance tests share: the three ways to take a step, and trajectories by the specifications."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from composer_sam import SharpnessAwareOptimizer, registry
from composer_sam.engine.rule import Method
from tests.problems import ALONG_THE_STEP_BEFORE, BASES, TWO_CALLS, network
from tests.reference import specifications

Batch = tuple[Tensor, Tensor]
Backward = Callable[[], Tensor]

METHODS = sorted(registry)


def by_closure(optimizer: SharpnessAwareOptimizer, backward: Backward) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward()

    optimizer.step(closure)


def by_loop(optimizer: SharpnessAwareOptimizer, backward: Backward) -> None:
    for _ in optimizer.passes():
        optimizer.zero_grad()
        backward()


def by_two_calls(optimizer: SharpnessAwareOptimizer, backward: Backward) -> None:
    optimizer.zero_grad()
    backward()
    optimizer.first_step(zero_grad=True)
    backward()
    optimizer.second_step()


WAYS = {'closure': by_closure, 'loop': by_loop, 'two calls': by_two_calls}
EVERY_WAY = [(name, way) for name in METHODS for way in WAYS if way != 'two calls' or name in TWO_CALLS]


def loss_of(model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def wrap(model: nn.Module, method: Method, base: str = 'SGD') -> SharpnessAwareOptimizer:
    return SharpnessAwareOptimizer(BASES[base](model.parameters()), method, model)


def take_step(optimizer: SharpnessAwareOptimizer, model: nn.Module, batch: Batch, way: str = 'closure') -> None:
    """Take one step of the optimizer on the batch."""

    def backward() -> Tensor:
        loss = loss_of(model, batch)
        loss.backward(create_graph=optimizer.method.backwards_create_graph)
        return loss

    WAYS[way](optimizer, backward)


def train(
    model: nn.Module,
    method: Method,
    data: Sequence[Batch],
    way: str = 'closure',
    base: str = 'SGD',
) -> SharpnessAwareOptimizer:
    """Take a step on every batch, from a fixed place of torch's random stream; return the optimizer."""
    optimizer = wrap(model, method, base)
    torch.manual_seed(7)
    for batch in data:
        take_step(optimizer, model, batch, way)
    return optimizer


def stand_still(model: nn.Module, method: Method | None, data: Sequence[Batch], way: str = 'closure') -> None:
    """Train at a learning rate of 0: with the method, or without one by plain SGD steps."""
    base = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    optimizer = None if method is None else SharpnessAwareOptimizer(base, method, model)
    torch.manual_seed(7)
    for batch in data:
        if optimizer is None:
            base.zero_grad()
            loss_of(model, batch).backward()
            base.step()
        else:
            take_step(optimizer, model, batch, way)


def comparable(name: str, model: nn.Module) -> dict[str, Tensor]:
    """What a model whose weights stand still has in common with one that takes plain steps.

    Where no pass is at w, buffers are those of the perturbed weights.
    """
    return dict(model.named_parameters()) if name in ALONG_THE_STEP_BEFORE else model.state_dict()


def flat(model: nn.Module) -> Tensor:
    """All weights as one vector of their own; a complex number as two real ones."""
    parts = [torch.view_as_real(p) if p.is_complex() else p for p in model.parameters()]
    return specifications.glue([part.detach() for part in parts])


def by_specification(name: str, model: nn.Module, data: Sequence[Batch], base: str = 'SGD', **values: Any) -> Tensor:
    """The weights after a step on every batch, as the method's specification takes it; the model's stay as they are."""
    pieces = [(n, p.shape) for n, p in model.named_parameters()]
    network = copy.deepcopy(model)
    gradients = [_gradient(network, batch, pieces, graph=name == 'SGDHess') for batch in data]
    return specifications.follow(name, values, specifications.BASES[base](), gradients, flat(model), pieces)


def _gradient(network: nn.Module, batch: Batch, pieces: specifications.Pieces, graph: bool) -> specifications.Gradient:
    """The gradient of the batch's loss. Every evaluation begins with the same buffers; the first is the one that counts
    in the network's."""
    before: dict[str, Tensor] = {}

    def outputs(w: Tensor) -> Tensor:
        values = dict(zip([n for n, _ in pieces], specifications.cut(w, pieces), strict=True))
        if before:
            values.update({n: buffer.clone() for n, buffer in before.items()})
        else:
            before.update({n: buffer.clone() for n, buffer in network.named_buffers()})
        return functional_call(network, values, (batch[0],))

    def loss(found: Tensor) -> Tensor:
        return loss_of(lambda _: found, batch)

    def gradient(w: Tensor) -> Tensor:
        w = w if w.requires_grad else w.clone().requires_grad_()
        (found,) = torch.autograd.grad(loss(outputs(w)), w, create_graph=graph)
        return found

    gradient.outputs, gradient.loss = outputs, loss  # pyright: ignore[reportFunctionMemberAccess] (FunctionalSAM's)
    return gradient


CLIP = 0.05  # what by_passes clips to, so that every step is clipped


def by_passes(
    method: Method,
    data: Sequence[Batch],
    accumulate: int = 1,
    base: str = 'SGD',
    clip: float | None = CLIP,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[nn.Module, SharpnessAwareOptimizer, list[Tensor]]:
    """What a trainer's run must end in: a plain loop over passes, whose base optimizer clips what it is given.

    Returns:
        The model, its optimizer, and the losses of all micro-batches in the pass that counts.
    """
    torch.manual_seed(3)
    model = network()
    made_base = BASES[base](model.parameters())
    if clip is not None:
        made_base.register_step_pre_hook(clipping(model, clip))
    scheduler = None if schedule is None else schedule(made_base)
    optimizer = SharpnessAwareOptimizer(made_base, method, model, scaler)
    losses: list[Tensor] = []
    for first in range(0, len(data), accumulate):
        for number in optimizer.passes():
            optimizer.zero_grad()
            for batch in data[first : first + accumulate]:
                with torch.autocast('cpu', autocast, enabled=autocast is not None):
                    loss = loss_of(model, number.part(batch)) / accumulate
                scaled: Any = loss if scaler is None else scaler.scale(loss)
                scaled.backward(create_graph=method.backwards_create_graph)
                if number == (0 if method.ascent_fraction == 1 else 1):
                    losses.append(loss.detach())
        if scaler is not None:
            scaler.update()
        if scheduler is not None:
            scheduler.step()
    return model, optimizer, losses


def clipping(model: nn.Module, most: float) -> Callable[..., None]:
    """The hook of a base optimizer that clips the norm of what it steps with."""

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), most)

    return clip

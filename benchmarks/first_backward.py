"""What a first pass saves that computes the gradients of the normalisation layers alone.

``SAM(parameters='normalization')`` perturbs along the gradient of the normalisation layers. Its first backward computes
the gradients of all parameters today. Here are passes that compute those of the normalisation layers only, and a SAM
step with such a first pass, beside whole passes and steps of the same round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.measure import interleaved, median, ratios, spread
from benchmarks.report import Table
from benchmarks.workloads import BASES, cifar_resnet18
from composer_sam import SAM, SharpnessAwareOptimizer
from composer_sam.engine.selection import select
from composer_sam.recipes.models import WideResidualNetwork

__all__ = ['measured', 'table']

BATCH = 32
ROUNDS = {'ResNet-18, 32 pixels': 10, 'WRN-10-1, 16 pixels': 60}
_MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    'ResNet-18, 32 pixels': (cifar_resnet18, 32),
    'WRN-10-1, 16 pixels': (functools.partial(WideResidualNetwork, 3, 10, 10, 1), 16),
}


def measured(threads: int, rounds: float = 1.0) -> list[list[Any]]:
    """Return the rows of the table; ``rounds`` is times the model's own number of rounds."""
    torch.set_num_threads(threads)
    return [row for name in _MODELS for row in _rows(name, max(2, round(rounds * ROUNDS[name])))]


def table(rows: list[list[Any]]) -> Table:
    """Return the table of :func:`measured`."""
    note = (
        f'Batches of {BATCH} images. Medians; ± is half the interquartile range. Ratios are to the whole pass, or '
        'to the step of SGD, of the same round. "by requires_grad" switches it off for the other parameters '
        'during the pass; "by autograd.grad" asks for the gradients of the chosen ones.'
    )
    columns = ('model', 'what', 'ms', 'beside', 'x', '± x')
    made = Table('First backward of the normalisation layers alone', columns, note=note)
    for row in rows:
        made.add(*row)
    return made


def _rows(name: str, rounds: int) -> Iterator[list[Any]]:
    build, size = _MODELS[name]
    passes, steps = _passes(build, size), _steps(build, size)
    samples = interleaved({**passes, **steps}, rounds, torch.device('cpu'), warmup=min(3, rounds))
    for group, base in ((passes, 'whole pass'), (steps, 'step of SGD')):
        for what in group:
            own = samples[what].seconds
            found = ratios(own, samples[base].seconds)
            yield [name, what, 1e3 * median(own), base, median(found), spread(found)]


def _model(build: Callable[[], nn.Module], size: int) -> tuple[nn.Module, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Return a network, a batch, the parameters of the normalisation layers, and the others."""
    torch.manual_seed(0)
    net = build()
    images, labels = torch.randn(BATCH, 3, size, size), torch.randint(10, (BATCH,))
    every = list(net.parameters())
    chosen = set(select('normalization', every, net))
    return net, images, labels, [every[i] for i in sorted(chosen)], [p for i, p in enumerate(every) if i not in chosen]


def _passes(build: Callable[[], nn.Module], size: int) -> dict[str, Callable[[], object]]:
    net, images, labels, chosen, others = _model(build, size)

    def loss() -> Tensor:
        net.zero_grad(set_to_none=True)
        return cross_entropy(net(images), labels)

    def alone() -> None:
        _require(others, False)
        loss().backward()
        _require(others, True)

    return {
        'whole pass': lambda: loss().backward(),
        'whole pass again': lambda: loss().backward(),
        'forward': loss,
        'pass of the normalisation layers, by requires_grad': alone,
        'pass of the normalisation layers, by autograd.grad': lambda: torch.autograd.grad(loss(), chosen),
    }


def _steps(build: Callable[[], nn.Module], size: int) -> dict[str, Callable[[], object]]:
    def step(method: SAM | None, alone: bool = False) -> Callable[[], object]:
        net, images, labels, _, others = _model(build, size)
        base = BASES['SGD'](list(net.parameters()))
        optimizer: Any = base if method is None else SharpnessAwareOptimizer(base, method, net)

        def closure(number: int = 1) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            first = alone and number == 0
            _require(others, not first)
            loss = cross_entropy(net(images), labels)
            loss.backward()
            _require(others, True)
            return loss

        def numbered(number: int) -> Tensor:
            return closure(number)

        return lambda: optimizer.step(numbered if alone else closure)

    chosen = "SAM(parameters='normalization')"
    return {
        'step of SGD': step(None),
        'SAM': step(SAM()),
        chosen: step(SAM(parameters='normalization')),
        f'{chosen}, first pass of these alone': step(SAM(parameters='normalization'), alone=True),
    }


def _require(parameters: list[Tensor], required: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(required)

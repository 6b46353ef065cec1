"""Small problems the tests step: networks with known corners, and closures that count and can be made to fail."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from composer_sam import registry
from composer_sam.methods.base import SharpnessAware

_Module = TypeVar('_Module', bound=nn.Module)

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    'SGD': lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-2),
    'AdamW': lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=1e-1),
}


def network(dtype: torch.dtype = torch.float32, dropout: float = 0.25, seed: int = 0) -> nn.Sequential:
    """A classifier with BatchNorm and dropout, about 200 parameters.

    No bias before BatchNorm: its gradient is rounding noise, which Adam would scale up to full steps.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(6, 9, bias=False),
            nn.BatchNorm1d(9),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(9, 7),
            nn.Tanh(),
            nn.Linear(7, 4),
        )
    return model.to(dtype)


def convolutional(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """A classifier of the same inputs with a convolution and BatchNorm, and nothing random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Unflatten(1, (1, 6)),
            nn.Conv1d(1, 3, 3, padding=1, bias=False),
            nn.BatchNorm1d(3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(18, 7),
            nn.Tanh(),
            nn.Linear(7, 4),
        )
    return model.to(dtype)


def batches(
    count: int, dtype: torch.dtype = torch.float32, size: int = 12, seed: int = 1
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 6, generator=generator).to(dtype), torch.randint(4, (size,), generator=generator))
        for _ in range(count)
    ]


def needs_graph(name: str) -> bool:
    """Whether the method differentiates the gradient again, so that the closure's backward must keep its graph."""
    return registry[name]().backwards_create_graph


def coupled(name: str, **values: Any) -> SharpnessAware:
    """The method with everything it does in the direction it hands to the base optimizer, nothing beside it."""
    return registry[name](**({'decouple': False} if name == 'WSAM' else {}), **values)


class Closure:
    """The closure of one batch; counts its calls, and raises ``fault`` after the backward of call ``fail_at``."""

    def __init__(
        self,
        model: nn.Module,
        batch: tuple[Tensor, Tensor],
        fault: BaseException | None = None,
        fail_at: int = 0,
        graph: bool = False,
    ):
        self.model, self.batch, self.fault, self.fail_at, self.graph = model, batch, fault, fail_at, graph
        self.calls = 0
        self.losses: list[float] = []

    def __call__(self) -> Tensor:
        self.calls += 1
        x, y = self.batch
        self.model.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward(create_graph=self.graph)
        self.losses.append(loss.item())
        if self.fault is not None and self.calls == self.fail_at:
            raise self.fault
        return loss


def gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that must have one."""
    assert parameter.grad is not None
    return parameter.grad


def part(model: nn.Module, name: str, kind: type[_Module]) -> _Module:
    """The submodule of that name, which must be of that class."""
    found = model.get_submodule(name)
    assert isinstance(found, kind), f'{name} is a {type(found).__name__}'
    return found


def numpy_stream() -> dict[str, Any]:
    """The state of NumPy's global stream, in a form that can be compared."""
    state = np.random.get_state(legacy=False)
    return {**state, 'state': {name: np.asarray(value).tolist() for name, value in state['state'].items()}}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything a failed step must leave as it was."""
    return {
        'model': copy.deepcopy(model.state_dict()),
        'optimizer': copy.deepcopy(optimizer.state_dict()),
        'random': (random.getstate(), numpy_stream(), torch.get_rng_state()),
        'steps': getattr(optimizer, 'steps_taken', None),
    }


def same(a: Any, b: Any) -> bool:
    """Bit-for-bit equality of nested containers of tensors (NaN equals itself)."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


class Recorder(torch.optim.Optimizer):
    """A base optimizer that keeps the directions it is given and, at lr 0, leaves the weights alone."""

    def __init__(self, params: Any, lr: float = 0.0):
        super().__init__(params, {'lr': lr})
        self.directions: list[list[Tensor | None]] = []

    def step(self, closure: Any = None) -> None:
        del closure
        self.directions.append(
            [None if p.grad is None else p.grad.clone() for group in self.param_groups for p in group['params']]
        )

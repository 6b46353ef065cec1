"""The optimizers that docs/migration.md leads away from, as they are commonly written: naive, restoring the weights by
subtracting the offset, with state of their own. They show what the old lines did; nothing else uses them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.problems import gradient

__all__ = ['UsualGAM', 'UsualSAM', 'UsualWeightedSAM']


class _Usual(torch.optim.Optimizer):
    """An optimizer around an optimizer: the groups are shared, the state is not."""

    def __init__(self, base: torch.optim.Optimizer, adaptive: bool):
        super().__init__(base.param_groups, {})
        self.base = base
        self.param_groups = base.param_groups
        self.adaptive = adaptive

    def with_gradient(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group['params'] if p.grad is not None]

    @torch.no_grad()
    def climb(self, rho: float, key: str, keep: bool = False) -> None:
        """Move along the gradients by rho, and note by how much (in addition to what is noted, with ``keep``)."""
        metrics = [p.abs() if self.adaptive else torch.ones_like(p) for p in self.with_gradient()]
        pairs = list(zip(self.with_gradient(), metrics, strict=True))
        length = _norm(t * gradient(p) for p, t in pairs) + 1e-12
        for p, t in pairs:
            offset = rho * t**2 * gradient(p) / length
            p.add_(offset)
            self.state[p][key] = self.state[p][key] + offset if keep else offset

    @torch.no_grad()
    def descend(self, key: str) -> None:
        for p in self.with_gradient():
            p.sub_(self.state[p][key])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.base.param_groups = self.param_groups


class UsualSAM(_Usual):
    """The classic ``SAM(params, base_optimizer_class, rho, ...)``."""

    def __init__(self, params: Any, base_optimizer: Any, rho: float = 0.05, adaptive: bool = False, **options: Any):
        super().__init__(base_optimizer(params, **options), adaptive)
        self.rho = rho

    def first_step(self, zero_grad: bool = False) -> None:
        self.climb(self.rho, 'e_w')
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        self.descend('e_w')
        self.base.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> None:  # pyright: ignore
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


class UsualWeightedSAM(_Usual):
    """WeightedSAM, in one process."""

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        gamma: float = 0.9,
        adaptive: bool = False,
        decouple: bool = True,
        max_norm: float | None = None,
    ):
        super().__init__(base_optimizer, adaptive)
        self.model, self.rho, self.decouple, self.max_norm = model, rho, decouple, max_norm
        self.alpha = gamma / (1 - gamma)

    def clip(self) -> None:
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)

    def first_step(self, zero_grad: bool = False) -> None:
        self.climb(self.rho, 'e_w')
        self.clip()
        for p in self.with_gradient():
            self.state[p]['grad'] = gradient(p).clone()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        self.descend('e_w')
        self.clip()
        for p in self.with_gradient():
            first = self.state[p]['grad']
            second = gradient(p)
            self.state[p]['sharpness'] = second - first
            p.grad = first.clone() if self.decouple else (1 - self.alpha) * first + self.alpha * second
        self.base.step()
        if self.decouple:
            for group in self.param_groups:
                for p in group['params']:
                    p.sub_(group['lr'] * self.alpha * self.state[p]['sharpness'])
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # pyright: ignore
        loss = closure()
        self.first_step(zero_grad=True)
        closure()
        self.second_step()
        return loss


class UsualGAM(_Usual):
    """GAM with ``set_closure``, in one process. Its checkpoint is the base optimizer's, as its authors write it."""

    def __init__(self, params: Any, base_optimizer: torch.optim.Optimizer, model: nn.Module, args: Any):
        super().__init__(base_optimizer, adaptive=False)
        self.model, self.args = model, args

    def set_closure(self, loss_fn: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor) -> None:
        def evaluate() -> tuple[Tensor, Tensor]:
            self.zero_grad()
            outputs = self.model(inputs)
            loss = loss_fn(outputs, targets)
            loss.backward()
            return outputs, loss.detach()

        self.evaluate = evaluate

    def keep(self, key: str) -> None:
        for p in self.with_gradient():
            self.state[p][key] = gradient(p).clone()

    def step(self) -> tuple[Tensor, Tensor]:  # pyright: ignore
        outputs, loss = self.evaluate()
        self.keep('g_0')
        self.climb(self.args.grad_rho, 'e_0')
        with without_running_statistics(self.model):
            self.evaluate()
            self.keep('g_1')
            self.descend('e_0')
            for p in self.with_gradient():
                p.grad = self.state[p]['g_1'] - self.state[p]['g_0']
            self.climb(self.args.grad_norm_rho, 'e_1_2')
            self.evaluate()
            self.keep('g_2')
            self.climb(self.args.grad_rho, 'e_1_2', keep=True)
            self.evaluate()
        self.decompose()
        self.descend('e_1_2')
        self.base.step()
        return outputs, loss

    def decompose(self) -> None:
        args, state, parameters = self.args, self.state, self.with_gradient()
        p = [state[w]['g_0'] + abs(args.grad_beta_2) * state[w]['g_2'] for w in parameters]
        q = [args.grad_beta_1 * state[w]['g_1'] + args.grad_beta_3 * gradient(w) for w in parameters]
        length_p, length_q = _norm(p), _norm(q)
        cosine = sum((x * y).sum() for x, y in zip(p, q, strict=True)) / (length_p * length_q + 1e-12)
        for w, x, y in zip(parameters, p, q, strict=True):
            w.grad = y - args.grad_gamma * (x - cosine * length_p * y / (length_q + 1e-12))

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)


def _norm(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack([part.square().sum() for part in parts]).sum().sqrt()


@contextlib.contextmanager
def without_running_statistics(model: nn.Module) -> Iterator[None]:
    """The usual way: BatchNorm with momentum 0."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0
    yield
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum

"""The optimizer wrapper: any torch optimizer, stepped with a sharpness-aware direction instead of the gradient."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from composer_sam.algorithm import Moment, SharpnessAware
from composer_sam.distributed import replicas
from composer_sam.step import Pass, Step

__all__ = ['SharpnessAwareOptimizer']

_MISSING = object()


class SharpnessAwareOptimizer(Optimizer):
    r"""Steps ``base_optimizer`` with the direction that ``method`` finds by gradients at perturbed weights.

    A step calls the closure once for every pass of the method, each time with the weights moved by an offset, puts the
    weights back bit for bit, and lets the base optimizer take one ordinary step with the method's direction in place
    of the gradient. Parameter groups and state *are* the base optimizer's: LR schedulers work on either, and a
    checkpoint of one is a checkpoint of the other.

    A step is a transaction. Whatever is raised in any pass (out of memory, Ctrl-C) leaves weights, module buffers,
    random streams, optimizer state and counters as they were before, gradients none, and the same batch can be stepped
    again. A step that the method's ``interval``, ``start`` or ``end`` exclude is the base optimizer's own step, at its
    cost and with its behaviour.

    Args:
        base_optimizer: any optimizer of dense gradients. A group may set hyper-parameters of the method for itself:
            ``SGD([{'params': a}, {'params': b, 'rho': 0.1}], lr=0.1)``; a key the base optimizer declares too
            (Adadelta's ``rho``) is the base optimizer's.
        method: the rule, for example ``SAM(rho=0.05)``.
        model: the module being trained. With it, buffers (BatchNorm statistics) are updated by the first pass only,
            DistributedDataParallel leaves the first pass unsynchronised, and FSDP's shards are counted once. Random
            streams are replayed with or without it.
        trainer: the trainer's side of a step, given by the Composer algorithm.

    Attributes:
        steps_taken (int): steps so far, for ``interval``. It is not part of the base optimizer's state: when you resume
            a loop of your own, set it to the number of steps taken. Under a Trainer its timestamp counts instead.

    Raises:
        TypeError: ``base_optimizer`` is no torch optimizer or ``method`` no method.
        ValueError: the optimizer is wrapped already, calls its closure several times per step (LBFGS), a group sets a
            hyper-parameter out of its range, or ``start``/``end`` need a Trainer.

    Example:
        >>> import torch
        >>> from composer_sam import SAM, SharpnessAwareOptimizer
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SAM(rho=0.05), model)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    # fused optimizers unscale inside their step, which a step of several passes cannot leave to them
    _step_supports_amp_scaling = False

    def __new__(cls, base_optimizer: Optimizer, *args: Any, **kwargs: Any) -> SharpnessAwareOptimizer:
        del args, kwargs
        return object.__new__(_named_like(type(base_optimizer)))

    def __init__(
        self,
        base_optimizer: Optimizer,
        method: SharpnessAware,
        model: nn.Module | None = None,
        trainer: Any = None,
    ):
        # torch.optim.Optimizer.__init__ is not called: groups, state, defaults and hooks are the base optimizer's.
        _check(base_optimizer, method)
        self.base_optimizer = base_optimizer
        self.method = method
        self.model = model
        self.trainer = trainer
        self.steps_taken = 0
        if trainer is None:
            method.check_without_trainer()
        self._resolved(self._moment())  # a group's hyper-parameter out of range is reported now

    # Shared with the base optimizer.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base_optimizer.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base_optimizer.defaults

    def state_dict(self) -> dict[str, Any]:
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base_optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base_optimizer.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        # Hooks, ``fused``, a library optimizer's own methods; only asked for what the wrapper itself does not have.
        if name == 'base_optimizer':
            raise AttributeError(name)
        return getattr(self.base_optimizer, name)

    def __repr__(self) -> str:
        return f'SharpnessAwareOptimizer({self.method!r}, {self.base_optimizer!r})'

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time and the trainer cannot be copied; an LR scheduler's patched ``step`` is left.
        return _rebuild, (self.base_optimizer, self.method, self.model, self.steps_taken)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharpnessAwareOptimizer:
        return _rebuild(*copy.deepcopy((self.base_optimizer, self.method, self.model, self.steps_taken), memo))

    # The step.

    def step(self, closure: Any = _MISSING) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step.

        Args:
            closure: zeroes the gradients, computes the loss, calls backward and returns the loss; called once a pass.
                A closure that takes ``loss_dict`` and ``ddp_sync`` is treated as Composer's: the trainer logs the
                first pass only, and a loss of ``None`` says that the gradient overflowed and the step is to be skipped.

        Returns:
            The first pass's loss, the loss at w; ``None`` where the step was skipped.

        Raises:
            ValueError: no closure, a closure that returns no loss, or a sparse gradient.
        """
        if closure is _MISSING or closure is None:
            return self._step_without_closure()
        closure = torch.enable_grad()(closure) if not torch.is_grad_enabled() else closure
        moment = self._moment()
        if not self.method.perturbs(moment):
            return self._plain_step(closure)
        composer = _takes(closure, 'loss_dict')
        controls = () if self.trainer is None else (self.trainer.control(closure),)
        loss: Any = None
        with Step(self._resolved(moment).direction, self._parameters(), self.state, self.model, controls) as step:
            for request in step.passes():
                value = self._call(closure, request, composer, first=step.index == 0)
                if value is None:
                    if not composer:
                        raise ValueError('the closure returned None: it must return the loss it called backward() on')
                    step.skip()
                    return None
                loss = value if step.index == 0 else loss
            step.write_direction()
            self.base_optimizer.step()
            step.commit()
        self.steps_taken += 1
        return loss

    def _plain_step(self, closure: Callable[..., Any]) -> Any:
        loss = closure()
        if loss is not None or not _takes(closure, 'loss_dict'):
            self.base_optimizer.step()
            self.steps_taken += 1
        return loss

    def _step_without_closure(self) -> None:
        # torch.distributed.checkpoint makes a fresh optimizer's state by one step with zero gradients at lr 0.
        gradients = [p.grad for group in self.param_groups for p in group['params'] if p.grad is not None]
        idle = all(float(group.get('lr', 0.0)) == 0.0 for group in self.param_groups)
        if gradients and idle and not self.state and not any(bool(g.any()) for g in gradients):
            self.base_optimizer.step()
            return
        raise ValueError(
            'step() needs a closure that zeroes the gradients, computes the loss, calls backward() and returns the '
            f'loss: {type(self.method).__name__} evaluates it {self.method.passes} times'
        )

    def _call(self, closure: Callable[..., Any], request: Pass, composer: bool, first: bool) -> Any:
        if composer:
            return closure(ddp_sync=request.sync) if first else closure(loss_dict={}, ddp_sync=request.sync)
        ddp = None if request.sync else replicas(self.model)
        with contextlib.nullcontext() if ddp is None else ddp.no_sync():
            return closure()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group['params'] if p.requires_grad]

    def _moment(self) -> Moment:
        return Moment(batch=self.steps_taken) if self.trainer is None else self.trainer.moment()

    def _resolved(self, moment: Moment) -> SharpnessAware:
        groups = [
            ({k: v for k, v in group.items() if k not in self.defaults}, sum(p.requires_grad for p in group['params']))
            for group in self.param_groups
        ]
        return self.method.resolved(moment, groups)


@functools.cache
def _named_like(base: type[Optimizer]) -> type[SharpnessAwareOptimizer]:
    """A wrapper class with the base optimizer's name.

    Composer stores an optimizer's state under its class's ``__qualname__`` and drops what it finds under another name.
    A wrapper of the same name is what makes checkpoints load with the algorithm and without it.
    """
    return type(base.__name__, (SharpnessAwareOptimizer,), {'__qualname__': base.__qualname__, '__doc__': base.__doc__})


def _rebuild(base: Optimizer, method: SharpnessAware, model: nn.Module | None, steps: int) -> SharpnessAwareOptimizer:
    optimizer = object.__new__(_named_like(type(base)))
    optimizer.base_optimizer, optimizer.method, optimizer.model = base, method, model
    optimizer.trainer, optimizer.steps_taken = None, steps
    return optimizer


@functools.lru_cache(maxsize=64)
def _code_takes(code: Any, name: str) -> bool:
    return name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _takes(closure: Callable[..., Any], name: str) -> bool:
    """Whether the closure has a parameter ``name``."""
    closure = inspect.unwrap(closure)
    code = getattr(closure, '__code__', None)
    return name in inspect.signature(closure).parameters if code is None else _code_takes(code, name)


def _check(base_optimizer: Any, method: Any) -> None:
    if isinstance(base_optimizer, SharpnessAwareOptimizer):
        raise ValueError(
            f'the optimizer is wrapped already, with {base_optimizer.method!r}: wrap the base optimizer once, '
            'with one method'
        )
    if not isinstance(base_optimizer, Optimizer):
        raise TypeError(f'base_optimizer must be a torch.optim.Optimizer, got {base_optimizer!r}')
    if not isinstance(method, SharpnessAware):
        raise TypeError(f"method must be one of composer_sam's methods, for example SAM(rho=0.05), got {method!r}")
    closure = inspect.signature(base_optimizer.step).parameters.get('closure')
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f'{type(base_optimizer).__name__} evaluates its closure several times per step, at weights of its own '
            'choice, and cannot take a direction from a sharpness-aware method'
        )

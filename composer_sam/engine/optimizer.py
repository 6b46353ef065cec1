"""The optimizer wrapper, which steps any torch optimizer with a sharpness-aware direction instead of the gradient."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from composer_sam.engine.closures import makes_state
from composer_sam.engine.host import Alone, Host
from composer_sam.engine.pass_number import PassNumber
from composer_sam.engine.rule import Method, check_method
from composer_sam.engine.scaling import refuse_unscaling
from composer_sam.engine.stepper import Stepper
from composer_sam.engine.two_calls import TwoCalls
from composer_sam.vectors.layout import is_first_rank

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ['SharpnessAwareOptimizer']

log = logging.getLogger(__name__)

Loss = TypeVar('Loss')


class SharpnessAwareOptimizer(Stepper, Optimizer):
    r"""A wrapper that steps ``base_optimizer`` with the direction of ``method``, from gradients at perturbed weights.

    A step calls the closure once for every pass of the method, each time with the weights moved by an offset. It puts
    the weights back bit for bit, and lets the base optimizer take one ordinary step with the method's direction in
    place of the gradient. Parameter groups and state *are* the base optimizer's: LR schedulers work with either object,
    and a checkpoint of one is a checkpoint of the other.

    A step is a transaction. An exception in any pass (out of memory, Ctrl-C) leaves weights, module buffers, random
    streams, optimizer state and counters as they were before the step, and no gradients; the same batch can be stepped
    again. A signal during the base optimizer's own step waits until everything is as after the step; a second signal
    does not wait. A step that the method's ``interval``, ``start`` or ``end`` exclude is the base optimizer's own step,
    at its cost and with its behaviour.

    Args:
        base_optimizer: any optimizer of dense gradients. A group may set its own hyper-parameters of the method:
            ``SGD([{'params': a}, {'params': b, 'rho': 0.1}], lr=0.1)``; a key that the base optimizer also has
            (Adadelta's ``rho``) sets the base optimizer's.
        method: the rule, for example ``SAM(rho=0.05)``.
        model: the module being trained. With it, buffers (BatchNorm statistics) are updated by the first pass only,
            DistributedDataParallel leaves the first pass unsynchronised, and FSDP's shards are counted once. Random
            streams are replayed with or without it.
        grad_scaler: for fp16 in a loop of your own. You scale every loss with it and call its ``update()`` after the
            step. The wrapper unscales every pass's gradient; if one overflows on any rank, it skips the step on all
            ranks.
        host: what runs the training loop; trainer integrations pass it. None for a loop of your own.

    Attributes:
        steps_taken (int): number of steps so far, for ``interval``. It is not part of the base optimizer's state: when
            you resume a loop of your own, set it. Under a Trainer, the trainer's timestamp counts instead.
        steps_perturbed (int): number of steps that the method has perturbed since the wrapper was made.
        skipped (bool): whether the last step was skipped, because a gradient overflowed or was not finite.
        observer: called on every perturbed step with the plain gradient at w and the direction that replaces it,
            averaged over ranks; see :func:`composer_sam.diagnostics.gradient_geometry`. None costs nothing.

    Raises:
        TypeError: ``base_optimizer`` is not a torch optimizer, or ``method`` is not a method.
        ValueError: the optimizer is wrapped already or calls its closure several times per step (LBFGS), ``model``
            holds none of its parameters, a group sets a hyper-parameter out of its range, or ``start``/``end`` need a
            Trainer; in the first step, the loss is scaled by a ``GradScaler`` that was not given as ``grad_scaler``.

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

    # fused optimizers unscale inside their step, but a step of several passes must unscale every pass
    _step_supports_amp_scaling = False
    # Composer reads this before it passes a closure at amp_fp16
    _step_supports_amp_closure = True

    def __new__(cls, base_optimizer: Optimizer, *args: Any, **kwargs: Any) -> Self:
        del args, kwargs
        return object.__new__(_named_like(cls, type(base_optimizer)))

    def __init__(
        self,
        base_optimizer: Optimizer,
        method: Method,
        model: nn.Module | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        *,
        host: Host | None = None,
    ):
        # torch.optim.Optimizer.__init__ is not called: groups, state, defaults and hooks are the base optimizer's.
        _check(base_optimizer, method)
        _check_model(base_optimizer, model)
        super().__init__(base_optimizer, method, model, grad_scaler, Alone() if host is None else host)
        self.host.check(method)
        method.check_base(base_optimizer)
        if method.watches_outputs and model is None:
            raise ValueError(
                f"{type(method).__name__} watches the model's outputs: SharpnessAwareOptimizer(base_optimizer, method, "
                'model) needs the model'
            )
        if grad_scaler is not None and grad_scaler.is_enabled() and method.backwards_create_graph:
            raise ValueError(
                f'{type(method).__name__} takes no grad_scaler: second derivatives of a scaled loss overflow '
                'unnoticed. Use bfloat16 or float32'
            )
        rule = self.resolved(self.moment())  # a group's hyper-parameter out of range is reported now
        self.check_names(rule)
        self._two_calls = TwoCalls(self)  # last: it adds a hook to the model, which a refused optimizer must not do

    # Shared with the base optimizer.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        if not self.host.steps_by_itself:
            refuse_unscaling()
        return self.base_optimizer.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base_optimizer.state

    @param_groups.setter
    def param_groups(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, groups: list[dict[str, Any]]
    ) -> None:
        self.base_optimizer.param_groups = groups

    @state.setter
    def state(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base_optimizer.state = state

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
        # Called only for names that the wrapper lacks: hooks, ``fused``, a library optimizer's own methods.
        if name == 'base_optimizer':
            raise AttributeError(name)
        return getattr(self.base_optimizer, name)

    def __repr__(self) -> str:
        return f'SharpnessAwareOptimizer({self.method!r}, {self.base_optimizer!r})'

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, and the host may be a trainer, which cannot be copied.
        made_of = (self.base_optimizer, self.method, self.model, self.grad_scaler, self.steps_taken)
        return _rebuild, (type(self).__base__, *made_of)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharpnessAwareOptimizer:
        rebuild, arguments = self.__reduce_ex__(2)
        return rebuild(*copy.deepcopy(arguments, memo))  # classes are not copied

    # The step: by a closure, by a loop over passes, or by two calls.

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss | None: ...

    @overload
    def step(self, closure: Callable[[PassNumber], Loss]) -> Loss | None: ...

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[..., Any] | None = None
    ) -> Any:
        """Take one step.

        Args:
            closure: zeroes the gradients, computes the loss, calls backward and returns the loss; called once per pass.
                If it takes an argument, that is the number of the pass, as :meth:`passes` yields it.

        Returns:
            The loss of the first pass over the whole batch, which is at w but for ``ascent_fraction`` and methods whose
            only pass is perturbed; ``None`` if the step was skipped.

        Raises:
            ValueError: there is no closure, the closure returns no loss, or a gradient is sparse.
        """
        if closure is None:
            self._step_without_closure()
            return None
        called = self.host.closure(closure)
        first_loss: Any = None
        # Closed explicitly: the traceback of an error would keep the generator alive and the weights perturbed.
        with self._two_calls.resting(), contextlib.closing(self.run(called)) as passes:
            for index, request in enumerate(passes):
                loss = called(request, index)
                if loss is None:
                    self.skip()
                    return None
                self.note(loss, index)
                if request.counts:
                    first_loss = loss.detach() if request.graph and isinstance(loss, Tensor) else loss
        return None if self.skipped else first_loss

    def passes(self) -> Iterator[PassNumber]:
        """Take one step in a loop: one iteration per pass, with any number of backward calls (micro-batches) in it.

        The step is taken when the loop ends normally. Leaving the loop early, or an exception inside it, undoes the
        step. Do not keep a reference to the iterator: it closes when the ``for`` statement drops it.

        Yields:
            The number of the pass, from 0. Its ``part(batch)`` is what the pass sees of a batch: the whole batch, or
            with ``ascent_fraction`` in the first pass the first samples.

        Example:
            >>> import torch
            >>> from composer_sam import GAM, SharpnessAwareOptimizer
            >>> model = torch.nn.Linear(3, 1)
            >>> optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), GAM(), model)
            >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
            >>> for _ in optimizer.passes():
            ...     optimizer.zero_grad()
            ...     torch.nn.functional.mse_loss(model(x), y).backward()
        """
        with self._two_calls.resting(), contextlib.closing(self.run()) as passes:
            for index, request in enumerate(passes):
                yield PassNumber(index, request.fraction)

    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights for the second pass; call it after the first backward of a two-pass method.

        The classic order is backward, ``first_step``, backward, ``second_step``. Prefer :meth:`passes`: between these
        two calls the weights are perturbed, and an exception there needs :meth:`abandon_step`. On a step that
        ``interval``, ``start`` or ``end`` exclude, the weights stay at w and the second gradient is not used.

        If ``model`` was given, the second forward sees the dropout masks and buffers of the first. Under
        DistributedDataParallel the first gradient is averaged over ranks, unless you called its backward under
        ``model.no_sync()``.

        Args:
            zero_grad: True leaves no gradient; False leaves a copy of the first gradient in ``.grad``, which you zero
                before the second backward.

        Raises:
            ValueError: the method does not have two passes, or ``second_step`` or a backward was missed.
        """
        self._two_calls.first(zero_grad)

    def second_step(self, zero_grad: bool = False) -> None:
        """Put the weights back and step the base optimizer with the direction; call it after the second backward.

        Args:
            zero_grad: True leaves no gradient; False leaves the direction in ``.grad``.

        Raises:
            ValueError: ``first_step`` or the second backward was missed; after a missed backward the state is as before
                ``first_step``.
        """
        self._two_calls.second(zero_grad)

    def abandon_step(self) -> None:
        """Undo a step that ``first_step`` began; do nothing if there is none."""
        self._two_calls.abandon()

    def _step_without_closure(self) -> None:
        if makes_state(self.param_groups, self.state):
            self.base_optimizer.step()
            return
        raise ValueError(
            'step() needs a closure that zeroes the gradients, computes the loss, calls backward() and returns the '
            f'loss: {type(self.method).__name__} evaluates it {self.method.passes} times'
        )


@functools.cache
def _named_like(wrapper: type[SharpnessAwareOptimizer], base: type[Optimizer]) -> type[Any]:
    """Return a subclass of the wrapper's class with the base optimizer's name.

    Composer stores an optimizer's state under its class's ``__qualname__`` and drops state under another name. Because
    the names are equal, checkpoints load with and without the algorithm.
    """
    return type(base.__name__, (wrapper,), {'__qualname__': base.__qualname__, '__doc__': base.__doc__})


def _rebuild(
    wrapper: type[SharpnessAwareOptimizer], base: Any, method: Any, model: Any, grad_scaler: Any, steps_taken: int
) -> SharpnessAwareOptimizer:
    optimizer = wrapper(base, method, model, grad_scaler)
    optimizer.steps_taken = steps_taken
    return optimizer


def _check(base_optimizer: Any, method: Any) -> None:
    if isinstance(base_optimizer, SharpnessAwareOptimizer):
        raise ValueError(
            f'the optimizer is wrapped already, with {base_optimizer.method!r}: wrap the base optimizer once, '
            'with one method'
        )
    if not isinstance(base_optimizer, Optimizer):
        raise TypeError(f'base_optimizer must be a torch.optim.Optimizer, got {base_optimizer!r}')
    check_method(method)
    closure = inspect.signature(base_optimizer.step).parameters.get('closure')
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f'{type(base_optimizer).__name__} evaluates its closure several times per step, at weights that it '
            'chooses, and cannot take a direction from a sharpness-aware method'
        )


def _check_model(base_optimizer: Optimizer, model: nn.Module | None) -> None:
    """Raise ValueError for a model that holds none of the parameters, and warn of one that holds a part of them."""
    if model is None:
        return
    held = {id(parameter) for parameter in model.parameters()}
    stepped = [p for group in base_optimizer.param_groups for p in group['params'] if p.requires_grad]
    missing = [p for p in stepped if id(p) not in held]
    if missing and len(missing) == len(stepped):
        raise ValueError(
            f'model must be the module that is trained, got a {type(model).__name__} that holds none of the '
            f"optimizer's {len(stepped)} parameters"
        )
    if missing and is_first_rank():
        log.warning(
            "The model holds %d of the optimizer's %d parameters. Modules outside of it (BatchNorm) count every pass "
            'of a step: pass the module that holds all of them.',
            len(stepped) - len(missing),
            len(stepped),
        )

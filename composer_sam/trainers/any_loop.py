"""A training loop that stays as it is: one line after its backward evaluates the other passes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from composer_sam.engine.rule import Method, Pass
from composer_sam.engine.split_step import SplitOptimizer
from composer_sam.trainers.host import Length, SplitHost, TrainerMoment

__all__ = ['LoopOptimizer']


class LoopOptimizer(SplitOptimizer):
    r"""The wrapper for a loop that stays as it is but for two lines: this object, and :meth:`other_passes`.

    .. code-block:: python

        optimizer = LoopOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SAM(rho=0.05), model)
        for x, y in loader:
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()
            optimizer.other_passes(lambda: loss_of(model(x), y).backward())
            clip_grad_norm_(model.parameters(), 1.0)      # of the direction
            optimizer.step()

    The model's first forward in training mode after a step begins the next one. ``loss`` and outputs stay those of the
    loop's own forward, at w (or where a method's only pass is). After :meth:`other_passes` the direction is in
    ``.grad``, so everything between it and ``step`` is as before: clipping, a ``GradScaler``'s ``unscale_``, ``step``
    and ``update``. With gradient accumulation, call it after the last backward, with a function that goes through all
    micro-batches again.

    Args:
        base_optimizer: the optimizer that the loop had.
        method: the rule, for example ``SAM(rho=0.05)``.
        model: the module that the loop calls: the wrapped one, the compiled one.
        grad_scaler: the loop's ``GradScaler``, if it has one. The function given to :meth:`other_passes` scales too.

    Raises:
        ValueError: ``ascent_fraction`` < 1, whose first pass comes before the loop's own (use
            :meth:`~composer_sam.SharpnessAwareOptimizer.passes`); a model of TorchScript, which takes no hooks; and
            what :class:`~composer_sam.SharpnessAwareOptimizer` raises.

    Example:
        >>> import torch
        >>> from composer_sam import SAM, LoopOptimizer
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = LoopOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SAM(rho=0.05), model)
        >>> x = torch.randn(8, 3)
        >>> model(x).square().mean().backward()
        >>> optimizer.other_passes(lambda: model(x).square().mean().backward())
        >>> optimizer.step()
        >>> optimizer.steps_perturbed
        1
    """

    evaluating = False  # whether the other passes are being evaluated

    def __init__(
        self,
        base_optimizer: Optimizer,
        method: Method,
        model: nn.Module,
        grad_scaler: torch.amp.GradScaler | None = None,
    ):
        host = SplitHost(lambda taken: TrainerMoment(taken, 0, Length(None, None)), units=('ba',))
        super().__init__(base_optimizer, method, model, grad_scaler, host=host)
        if method.ascent_fraction < 1:
            raise ValueError(
                f'ascent_fraction={method.ascent_fraction} needs passes() or step(closure) of a '
                'SharpnessAwareOptimizer: its first pass comes before the forward of the loop'
            )
        if isinstance(model, torch.jit.ScriptModule):
            raise ValueError('a model of TorchScript takes no hooks: use passes() of a SharpnessAwareOptimizer')
        # Before the hooks of FSDP2, which gathers the weights.
        model.register_forward_pre_hook(_Beginning(self), prepend=True)

    def other_passes(self, again: Callable[[], Any]) -> None:
        """Evaluate the other passes of the step, after the loop's last backward; the direction is then in ``.grad``.

        Args:
            again: does the step's forwards and backwards once more: all micro-batches, and the same scaling of the
                loss. It need not zero the gradients, and what it returns is not used.

        Raises:
            ValueError: no forward of the model in training mode, or no backward, came before it.
        """
        if not self.under_way:
            raise ValueError(
                'other_passes() needs a forward of the model in training mode since the last step: give LoopOptimizer '
                'the module that the loop calls'
            )
        self.evaluating = True
        try:
            with contextlib.closing(self._rest(self._advance)) as passes:
                for _ in passes:
                    self.base_optimizer.zero_grad()
                    again()
        finally:
            self.evaluating = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the base optimizer step with the direction; do nothing if the step was skipped.

        Raises:
            ValueError: :meth:`other_passes` was not called, or a closure is given.
        """
        if closure is not None:
            raise ValueError('LoopOptimizer takes no closure: write other_passes(...) after the backward, then step()')
        if self.under_way:
            self.abandon_step()
            raise ValueError('step() came before other_passes(...), which belongs right after the backward')
        return super().step()


class _Beginning:
    """A forward pre-hook that begins a step. A copy, made with its module, does nothing."""

    def __init__(self, optimizer: LoopOptimizer | None = None):
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)

    def __call__(self, module: nn.Module, *_: Any) -> None:
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None or not module.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if optimizer.evaluating:
            return
        if optimizer.under_way:
            optimizer.resume()
        else:
            optimizer.begin(_never)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Beginning, ()


def _never(request: Pass) -> Any:
    raise RuntimeError(f'a pass over a part of the batch comes before the forward of the loop: {request}')

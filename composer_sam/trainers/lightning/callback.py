"""The callback, which attaches a method to a Trainer for the time of a fit."""

from __future__ import annotations

import contextlib
from typing import Any

from composer_sam.engine.rule import Method, check_method
from composer_sam.engine.split_step import SplitOptimizer
from composer_sam.trainers.lightning.checks import check
from composer_sam.trainers.lightning.package import pl
from composer_sam.trainers.lightning.passes import Passes
from composer_sam.trainers.said import say_if_nothing_was_perturbed

__all__ = ['SharpnessAware']


class SharpnessAware(pl.Callback):
    r"""A callback that turns the steps of a Lightning Trainer into those of a method; the module stays as it is.

    Lightning's own forward and backward are the first pass of a step. What ``training_step`` logs, returns and measures
    with metrics is of this pass: the loss at w, or at the perturbed weights with ``ascent_fraction`` and methods whose
    only pass is perturbed. After the last micro-batch of a step, the callback calls ``training_step`` and ``backward``
    again for every other pass, with the same batches, random numbers and buffers; nothing is logged then. The direction
    is what Lightning clips, once, what ``on_before_optimizer_step`` sees, and what the optimizer steps with.
    ``on_before_backward`` and ``on_after_backward`` are called in every pass.

    ``interval``, ``start`` and ``end`` count by ``trainer.global_step`` and ``trainer.current_epoch``, so a resumed run
    goes on in the same phase. What a method remembers is in the optimizer's state; a checkpoint loads with and without
    the callback. The Trainer's loggers get the radius, the gradient's norm and the loss of the last pass under the
    method's name (``sam/rho``), every ``log_every_n_steps`` steps.

    With gradient accumulation, every pass goes through all micro-batches of the step. Under DDP the first pass is not
    averaged over ranks (m-sharpness) unless the method has ``sync_first_pass=True``; under FSDP every pass is. With
    ``precision='16-mixed'`` a step is skipped if any of its passes overflows on any rank. FunctionalSAM watches what
    ``self(x)`` returns in ``training_step``.

    With manual optimization the module steps its optimizer itself, so it wraps it itself. The wrapper counts its own
    steps: when you resume, set its ``steps_taken``. ``16-mixed`` is refused there.

    .. code-block:: python

        def configure_optimizers(self):
            base = torch.optim.SGD(self.parameters(), lr=0.1)
            return SharpnessAwareOptimizer(base, SAM(rho=0.05), self.trainer.model)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)

    If you use the older package ``pytorch_lightning``, import it before this module.

    Args:
        method: the rule, for example ``SAM(rho=0.05)``.

    Attributes:
        optimizer (SplitOptimizer | None): the wrapper of the last fit, with its counters ``steps_taken`` and
            ``steps_perturbed``; None before the first.

    Cost:
        The method's passes. A copy of every micro-batch of the step, so that what ``training_step`` changes in its
        batch in place is not changed twice; none in steps that ``interval``, ``start`` or ``end`` exclude.

    Raises:
        TypeError: ``method`` is not one of composer_sam's methods.
        ValueError: when the fit begins: manual optimization; ``configure_optimizers`` returns no optimizer, or one that
            is wrapped already; DeepSpeed or XLA, which take the step themselves; ``training_step(dataloader_iter)``,
            whose batches cannot be given to it again; ``ascent_fraction`` with gradient accumulation, because Lightning
            loads micro-batches one at a time, and the first pass needs a part of each before the loss is computed; and
            what :class:`~composer_sam.SharpnessAwareOptimizer` raises.

    Example:
        >>> import torch, lightning.pytorch as pl
        >>> from composer_sam import SAM
        >>> from composer_sam.trainers.lightning import SharpnessAware
        >>> class Model(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(3, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return self.layer(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> callback = SharpnessAware(SAM(rho=0.05))
        >>> trainer = pl.Trainer(max_epochs=1, accelerator='cpu', barebones=True, callbacks=[callback])
        >>> trainer.fit(Model(), torch.randn(4, 8, 3))   # four batches
        >>> callback.optimizer.steps_perturbed
        4
    """

    def __init__(self, method: Method):
        check_method(method)
        self.method = method
        self.optimizer: SplitOptimizer | None = None
        self._attached = contextlib.ExitStack()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        check(self.method, trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # Not before: the length of the run is known when the data is set up, which must wait for a checkpoint's loops.
        self._attached.close()
        passes = Passes(self.method, trainer, pl_module)
        self.optimizer = passes.optimizer
        self._attached.enter_context(passes.attached())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.optimizer is not None:
            self.optimizer.give_up()  # the run may end in the middle of a window of gradient accumulation
            say_if_nothing_was_perturbed(self.optimizer)
        self._attached.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.optimizer is not None:
            self.optimizer.abandon_step()
        self._attached.close()

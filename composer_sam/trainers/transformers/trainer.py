"""The mixin that gives a Trainer the steps of a method, and transformers' own Trainer with it."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Many methods of transformers' Trainer have no types.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer

from composer_sam.engine.rule import Method, check_method
from composer_sam.engine.split_step import SplitOptimizer
from composer_sam.trainers.transformers.checks import check_class, check_trainer
from composer_sam.trainers.transformers.steps import TrainerSteps

__all__ = ['SharpnessAwareMixin', 'SharpnessAwareTrainer']

_Trainer = Trainer if TYPE_CHECKING else object


class SharpnessAwareMixin(_Trainer):
    r"""The steps of a method for a Trainer of your own.

    .. code-block:: python

        class SharpSFTTrainer(SharpnessAwareMixin, SFTTrainer):
            pass

        trainer = SharpSFTTrainer(method=SAM(rho=0.05), model=model, args=args, train_dataset=data)
        trainer.train()

    The Trainer works as without it: arguments, callbacks, checkpoints, schedulers and logs stay as they are. Its own
    forward of every micro-batch is the first pass of a step. The logged loss, and what ``compute_loss`` measures, are
    of this pass: at w, or at the perturbed weights with ``ascent_fraction`` and methods whose only pass is perturbed.
    After the last micro-batch of a step the other passes see all micro-batches again, with the same random numbers and
    buffers. The direction is what the Trainer clips, once (``max_grad_norm``), what ``grad_norm`` in the log is the
    norm of, and what the optimizer steps with.

    ``compute_loss`` is called for every micro-batch in every pass. What it counts in attributes of the trainer
    (numbers, lists, dictionaries of such) counts once, and ``log`` does nothing in the other passes. If the class that
    has the mixin as a base overrides ``training_step``, its own code is called in the first pass only.

    Under DistributedDataParallel the first pass is not averaged over ranks (m-sharpness) unless the method has
    ``sync_first_pass=True``; under FSDP every pass is. With ``fp16=True`` a step is skipped if any of its passes
    overflows on any rank.

    A run that is resumed with ``resume_from_checkpoint`` ends in the same bits. What a method remembers is in the
    optimizer's state. A checkpoint loads with and without the method.

    With every ``'loss'`` the log has, under the method's name, the radius (``'sam/rho'``), ``'sam/gradient_norm'``,
    ``'sam/perturbed_loss'`` and whether the last step was perturbed. They are read from the device only then.

    Args:
        *args: those of your Trainer.
        method: the rule, for example ``SAM(rho=0.05)``. Its ``start`` and ``end`` may be in optimizer steps
            (``'500ba'``), whole epochs (``'2ep'``) and parts of the run (``'0.8dur'``).
        **kwargs: those of your Trainer.

    Attributes:
        sharpness_aware_optimizer (SplitOptimizer | None): the wrapper of the run, with its counters ``steps_taken`` and
            ``steps_perturbed``; None before :meth:`train`.

    Cost:
        The method's passes. A copy of every micro-batch of a perturbed step, so that what a model changes in its batch
        in place is not changed twice.

    Raises:
        TypeError: ``method`` is not one of composer_sam's, or the class is no Trainer.
        ValueError: the method needs what a Trainer cannot measure. Something else takes the step: DataParallel (several
            GPUs in one process), DeepSpeed, Apex, SageMaker's model parallelism, XLA, optimizers that step during the
            backward (LOMO, layerwise ones). The Trainer generates samples in its training step (GRPO, PPO and others of
            trl), so that passes would see different ones. With ``ascent_fraction``: a batch has tensors of different
            lengths.
        RuntimeError: the Trainer of this version of transformers lacks a method that is overridden, or ``train`` does
            not call it.

    Note:
        Where a callback stops the epoch in the middle of a step, or the data ends there, the micro-batches of that step
        are dropped. A plain Trainer adds their gradient to the next step.

        Of a checkpoint of FSDP2's shards (``SHARDED_STATE_DICT``) Accelerate does not load what a method remembers. The
        methods that remember anything (LookSAM, VaSSO and others) then begin anew, and say so in the log. From a whole
        checkpoint (``FULL_STATE_DICT``) they go on.
    """

    def __init__(self, *args: Any, method: Method, **kwargs: Any):
        check_method(method)
        check_class(type(self))
        super().__init__(*args, **kwargs)
        check_trainer(self)
        self._sharpness_aware = TrainerSteps(self, method, super().training_step, super().get_batch_samples)

    @property
    def sharpness_aware_optimizer(self) -> SplitOptimizer | None:
        return self._sharpness_aware.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self._sharpness_aware.running():
            return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._sharpness_aware.expect(batches, items)
        return batches, items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        if not self._sharpness_aware.under_way:  # called by hand, outside of train()
            return super().training_step(model, inputs, num_items_in_batch)
        return self._sharpness_aware.training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._sharpness_aware.evaluating:
            return
        more = self._sharpness_aware.logged() if 'loss' in logs else {}
        super().log({**logs, **more}, *args, **kwargs)


class SharpnessAwareTrainer(SharpnessAwareMixin, Trainer):
    r"""The Trainer of transformers with the steps of a method.

    What it does, costs and refuses is said at :class:`SharpnessAwareMixin`.

    Args:
        *args: those of ``transformers.Trainer``.
        method: the rule, for example ``SAM(rho=0.05)``.
        **kwargs: those of ``transformers.Trainer``.

    Example:
        >>> import contextlib, io, tempfile
        >>> import torch
        >>> from composer_sam import SAM
        >>> from composer_sam.trainers.transformers import SharpnessAwareTrainer
        >>> from transformers import TrainingArguments
        >>> class Regression(torch.nn.Linear):
        ...     def forward(self, x, labels):
        ...         prediction = super().forward(x)
        ...         return {'loss': (prediction - labels).square().mean(), 'logits': prediction}
        >>> data = [{'x': torch.randn(3), 'labels': torch.randn(1)} for _ in range(16)]
        >>> options = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=3)
        >>> options |= dict(use_cpu=True, dataloader_pin_memory=False, report_to=[])
        >>> with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        ...     args = TrainingArguments(folder, **options)
        ...     trainer = SharpnessAwareTrainer(
        ...         method=SAM(rho=0.05), model=Regression(3, 1), args=args, train_dataset=data
        ...     )
        ...     output = trainer.train()
        >>> output.global_step, trainer.sharpness_aware_optimizer.steps_perturbed
        (6, 6)
    """

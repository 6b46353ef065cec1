"""Functional SAM: the part of SAM's gradient that goes through the function, without that of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from composer_sam.engine.rule import Direction, Pass, Passes
from composer_sam.engine.step import Step
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.hyperparameters import hyperparameter
from composer_sam.vectors import Number

__all__ = ['FunctionalSAM']


@dataclass(eq=False)
class FunctionalSAM(SharpnessAware):
    r"""Functional SAM: the second pass sees the loss's gradient at the outputs as it was at w.

    With z the model's outputs (its logits) and :math:`r = \partial L / \partial z` at w,

    .. math::

        e = \rho \, \frac{g}{\lVert g \rVert + \epsilon}, \qquad
        d = \left( \frac{\partial z}{\partial w}(w + e) \right)^{\!\top} r, \qquad
        w \leftarrow \text{base}(w, d)

    that is, the gradient at w + e of :math:`\langle z, r \rangle`. Sharpness is lowered through the function alone;
    SAM lowers it mostly through the loss, which hurts language models.

    Any closure will do: hooks on the model's outputs keep their gradient in the first pass and put it in place of the
    new one in the second. With micro-batches every forward has its own. The model's output is a tensor, or has a
    tensor named ``logits``, or one that ``output`` names.

    Args:
        rho: radius of the perturbation, :math:`\rho > 0`, in the units of the weights' norm. May be set per group.
        output: name of the tensor in the model's output, an attribute or a key; None: the output itself, or its
            ``logits``.
        epsilon: added to the norm, :math:`\epsilon \ge 0`. May be set per group.

    Passes and memory:
        2 passes per perturbing step, one copy of the parameters and the gradient of the outputs at the peak, nothing
        between steps.

    Parameters that act on the loss after the outputs get the new gradient. A model that is compiled must be given to
    the optimizer as it is called: a hook inside a compiled graph cannot act.

    Settings:
        No published settings beyond the defaults. The paper trains language models with AdamW, and finds a further gain
        with a preconditioned perturbation, which is not in this class.

    Raises:
        ValueError: a hyper-parameter is out of its range; the optimizer has no ``model``; at the first step, which is
            undone, the output has no such tensor, or the loss does not depend on it.

    Example:
        >>> from composer_sam import FunctionalSAM
        >>> algorithm = FunctionalSAM(rho=0.05)   # Trainer(algorithms=[algorithm])

    Reference:
        Singh, Mobahi, Agarwala, Dauphin: Avoiding spurious sharpness minimization broadens applicability of SAM,
        ICML 2025, https://arxiv.org/abs/2502.02407
    """

    rho: Number = hyperparameter(0.05, gt=0)
    output: str | None = None
    epsilon: Number = hyperparameter(1e-12, ge=0)

    paper: ClassVar[str] = 'Singh et al., ICML 2025, https://arxiv.org/abs/2502.02407'
    when: ClassVar[str] = 'you train a language model'
    watches_outputs: ClassVar[bool] = True

    def direction(self, step: Step) -> Passes:
        kept = step.output_gradients(self.output)
        grad = yield Pass(sync=self.sync_first_pass, outputs=kept)
        kept.replay()
        at = step.offset(grad.donate(), self.rho, self.epsilon)
        ascent_grad = yield Pass(at=at.donate(), outputs=kept)
        return Direction(ascent_grad)

"""The geometry of directions and gradients during training, as a Composer callback."""

from __future__ import annotations

from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from composer_sam.diagnostics.checks import check_at_least
from composer_sam.diagnostics.geometry import GradientGeometry, gradient_geometry
from composer_sam.engine.optimizer import SharpnessAwareOptimizer
from composer_sam.vectors import Vector

__all__ = ['GradientGeometryMonitor']


class GradientGeometryMonitor(Callback):
    """Logs ``geometry/<number>`` of :func:`~composer_sam.diagnostics.gradient_geometry` on perturbed steps.

    ``gradient_norm``, ``direction_norm``, ``cosine``, ``share_larger`` and ``share_opposite``, over all ranks and
    shards. Training goes on bit for bit as without the callback.

    Args:
        interval: look at every ``interval``-th perturbed step, :math:`\\ge 1`.

    Cost:
        No extra pass. On the steps looked at one copy of the gradient in memory and a few reads of it; under
        DistributedDataParallel one more exchange of gradients, where the first pass is not synchronised.

    Raises:
        ValueError: ``interval`` out of its range; when fitting starts, no sharpness-aware method in the Trainer.

    Example:
        >>> from composer_sam import SAM
        >>> from composer_sam.trainers.composer import GradientGeometryMonitor
        >>> monitor = GradientGeometryMonitor()   # Trainer(algorithms=[SAM()], callbacks=[monitor])
    """

    def __init__(self, interval: int = 1) -> None:
        check_at_least('interval', interval, 1)
        self.interval = interval
        self._perturbed = 0
        self._found: GradientGeometry | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        del logger
        # Algorithms come before callbacks: a method has swapped the optimizer by now.
        if not isinstance(state.optimizers[0], SharpnessAwareOptimizer):
            raise ValueError(
                'GradientGeometryMonitor compares the direction of a sharpness-aware method with the gradient: '
                'add one to the Trainer, for example algorithms=[SAM()]'
            )

    def batch_start(self, state: State, logger: Logger) -> None:
        del logger
        self._found = None
        optimizer = state.optimizers[0]
        if not isinstance(optimizer, SharpnessAwareOptimizer):
            return
        perturbs = optimizer.method.perturbs(optimizer.moment())
        self._perturbed += perturbs
        optimizer.observer = self._observe if perturbs and self._perturbed % self.interval == 0 else None

    def batch_end(self, state: State, logger: Logger) -> None:
        del state
        if self._found is not None:
            logger.log_metrics({f'geometry/{name}': value for name, value in self._found.as_dict().items()})

    def state_dict(self) -> dict[str, Any]:
        return {'perturbed': self._perturbed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._perturbed = state['perturbed']

    def _observe(self, gradient: Vector, direction: Vector) -> None:
        self._found = gradient_geometry(gradient, direction)

"""A loss that stays at its initial value while steps are perturbed: the radius is probably too large."""

from __future__ import annotations

import logging
from collections import deque

__all__ = ['Stalled']

log = logging.getLogger(__name__)

_FIRST = 10  # losses whose mean is the initial loss
_AFTER = 100  # perturbed steps after which to look
_LAST = 50  # losses that must all be close to the initial one
_CLOSE = 0.05  # relative distance that counts as close: batches alone make the loss of a training network vary more


class Stalled:
    """Watches the losses at w and gives one hint where they do not leave their initial value.

    Args:
        method: the method, as the hint shows it.
    """

    def __init__(self, method: object):
        self._method = method
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=_LAST)
        self._perturbed = 0

    @property
    def looks(self) -> bool:
        """Whether more losses are needed."""
        return self._perturbed < _AFTER

    def see(self, loss: float) -> None:
        """Note the loss at w of a perturbed step."""
        self._perturbed += 1
        if len(self._first) < _FIRST:
            self._first.append(loss)
        self._last.append(loss)
        if self._perturbed == _AFTER:
            initial = sum(self._first) / len(self._first)
            if all(abs(loss - initial) <= _CLOSE * abs(initial) for loss in self._last):
                log.warning(
                    'After %d perturbed steps the loss is still at its initial value, %.4g: the perturbation may be '
                    'too large for the start of training. Try a smaller rho than in %r, or let it grow: '
                    "start='0.1dur', or schedules={'rho': ...} with a factor that rises from 0 to 1.",
                    _AFTER,
                    initial,
                    self._method,
                )

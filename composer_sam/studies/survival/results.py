"""The results of a survival study, as their files hold them. A number that is not finite is None."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from composer_sam.studies.result import finite

__all__ = ['Finetuned', 'Measured']


@dataclass(frozen=True)
class Measured:
    """The losses of a trained network on the text it was trained for, as it is and damaged.

    Attributes:
        name: the name of the run that trained it.
        loss: the loss on the test sequences.
        quantized: the loss with quantised weights, by the number of bits.
        noisy: the losses with noise on the weights, one for every draw, by the size of the noise.
        sequences: the number of test sequences.
        config: everything the result depends on.
    """

    name: str
    loss: float | None
    quantized: dict[str, float | None]
    noisy: dict[str, list[float | None]]
    sequences: int
    config: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return JSON's own types."""
        return finite(vars(self))


@dataclass(frozen=True)
class Finetuned:
    """The losses of a network that was fine-tuned on other text.

    Attributes:
        name: the name of the fine-tuning.
        network: the name of the run that trained the network.
        values: the values of the grid of the fine-tuning recipe.
        before: the loss on the test sequences of the other text before the fine-tuning.
        after: the same after it.
        first: the loss on the test sequences of the first text after it.
        steps: optimizer steps.
        seconds: wall time of all steps.
        config: everything the result depends on.
    """

    name: str
    network: str
    values: dict[str, Any]
    before: float | None
    after: float | None
    first: float | None
    steps: int
    seconds: float
    config: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return JSON's own types."""
        return finite(vars(self))

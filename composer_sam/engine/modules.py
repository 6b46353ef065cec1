"""The modules of a model, which take long to list."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import torch
from torch import nn

__all__ = ['Modules']


class Modules:
    """The modules of a model, listed again only where one was added, removed or replaced.

    Args:
        model: the model.

    Attributes:
        model (nn.Module): the model.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        # The modules, and the children of each. One attribute, so that an interrupt cannot leave half of it.
        self._known: tuple[list[nn.Module], list[list[nn.Module | None]]] = [], []

    def all(self) -> list[nn.Module]:
        """Return all modules, in torch's order."""
        listed, known = self._known
        if not listed or any(
            list(module._modules.values()) != children for module, children in zip(listed, known, strict=True)
        ):
            listed = list(self.model.modules())
            if any(isinstance(module, torch.jit.ScriptModule) for module in listed):
                return listed  # TorchScript makes its children anew every time
            self._known = listed, [list(module._modules.values()) for module in listed]
        return listed

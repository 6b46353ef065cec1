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
        self._listed: list[nn.Module] = []
        self._children: list[list[nn.Module | None]] = []

    def all(self) -> list[nn.Module]:
        """Return all modules, in torch's order."""
        if not self._listed or any(
            list(module._modules.values()) != children
            for module, children in zip(self._listed, self._children, strict=True)
        ):
            modules = list(self.model.modules())
            if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
                return modules  # TorchScript makes its children anew every time
            self._listed, self._children = modules, [list(module._modules.values()) for module in modules]
        return self._listed

"""Weights as quantisation or noise leaves them: what is done to a network after its training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from composer_sam.diagnostics.checks import check_at_least, check_between, check_positive
from composer_sam.engine.selection import select

__all__ = ['BITS', 'noisy', 'quantized']

BITS = (2, 16)  # the fewest and the most


@torch.no_grad()
def quantized(model: nn.Module, bits: int, group: int = 64) -> dict[str, Tensor]:
    r"""Return the weights of the linear layers rounded to ``bits`` bits, by name.

    Each row of a matrix, the weights of one output, is cut into groups of inputs. With the largest absolute value m of
    a group, its weights are rounded to the nearest of equally spaced numbers, as for storage in integers with one scale
    per group:

    .. math:: q(w) = s \operatorname{round}(w / s), \qquad s = m / (2^{b-1} - 1)

    Args:
        model: its layers are ``torch.nn.Linear`` and ``Conv1D`` of transformers. A matrix that is shared with an
            embedding, as in networks with tied embeddings, is not rounded.
        bits: b, an integer in [2, 16].
        group: the number of inputs of a group, an integer >= 1.

    Returns:
        New tensors in the precision of the weights; the model is not changed.

    Raises:
        ValueError: a number is out of its range, or there is no linear layer.

    Example:
        >>> import torch
        >>> from composer_sam.diagnostics import quantized
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.7, -0.18, 0.04]]))
        >>> print(quantized(model, bits=4)['weight'])
        tensor([[ 0.7000, -0.2000,  0.0000]])
    """
    check_between('bits', bits, *BITS)
    check_at_least('group', group, 1)
    return {
        name: torch.cat([_rounded(part, 2 ** (bits - 1) - 1, inputs) for part in weight.split(group, inputs)], inputs)
        for name, weight, inputs in _matrices(model)
    }


@torch.no_grad()
def noisy(model: nn.Module, size: float, seed: int) -> dict[str, Tensor]:
    r"""Return the weights of the linear layers with Gaussian noise added, by name.

    .. math:: W + \sigma \, \mathrm{rms}(W) \, \xi, \qquad \xi_{ij} \sim \mathcal{N}(0, 1)

    The noise is relative to the root mean square of each matrix, so that its effect does not depend on the scale of a
    layer.

    Args:
        model: as for :func:`quantized`.
        size: :math:`\sigma`, > 0.
        seed: the seed of the noise, which is the same on every device.

    Returns:
        New tensors; the model is not changed.

    Raises:
        ValueError: the size is out of its range, or there is no linear layer.

    Example:
        >>> import torch
        >>> from composer_sam.diagnostics import noisy
        >>> model = torch.nn.Linear(1000, 100, bias=False)
        >>> offset = noisy(model, size=0.1, seed=0)['weight'] - model.weight
        >>> f'{offset.square().mean().sqrt() / model.weight.square().mean().sqrt():.2f}'
        '0.10'
    """
    check_positive('size', size)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight, _ in _matrices(model):
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight)
        found[name] = weight + size * weight.square().mean().sqrt() * noise
    return found


def _matrices(model: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Yield the name and the weights of every linear layer, and the dimension of the weights that is its inputs."""
    named = list(model.named_parameters())
    layers = dict(model.named_modules())
    for place in select('linear', [parameter for _, parameter in named], model):
        name, parameter = named[place]
        if parameter.ndim == 2:
            yield name, parameter.detach(), 1 if isinstance(layers[name.rpartition('.')[0]], nn.Linear) else 0


def _rounded(weight: Tensor, most: int, inputs: int) -> Tensor:
    """Round a group of every row, which lies along the dimension ``inputs``."""
    scale = weight.abs().amax(inputs, keepdim=True) / most
    return torch.where(scale > 0, (weight / scale).round() * scale, weight)

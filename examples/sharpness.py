"""Measure how sharp the loss is around networks that something else has trained: all it takes is a model and data.

Run: python examples/sharpness.py
Time: about 15 seconds.

Two networks are trained by plain SGD, one on digits with the right labels, one on digits with 40 % wrong labels.
The second one ends in a sharper place. docs/landscapes.md has a command for checkpoints of a Trainer, and pictures.
"""

from __future__ import annotations

import torch
from noisy_digits import noisy_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from composer_sam.diagnostics import Objective, sam_sharpness, top_eigenvalues, trace


def network() -> nn.Module:
    """Return the network with new weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def trained_elsewhere(data: TensorDataset) -> dict[str, Tensor]:
    """Return trained weights. In their place could be a file: ``torch.load('weights.pt', weights_only=True)``."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(data, batch_size=64, shuffle=True)
    for _ in range(40):
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.state_dict()


def main() -> None:
    print(f'{"wrong labels":>12}  {"loss":>7}  {"largest eigenvalue":>18}  {"trace":>14}  {"SAM sharpness":>13}')
    for wrong in (0.0, 0.4):
        data, _ = noisy_digits(wrong)
        model = network()
        model.load_state_dict(trained_elsewhere(data))

        # The loss as a function of the weights, over a fixed set of samples. The model is left as it was.
        objective = Objective(model, cross_entropy, [data.tensors])
        eigenvalue = top_eigenvalues(objective).values[0]  # of the Hessian: the curvature in the steepest direction
        curvature = trace(objective, estimator='hutch++', probes=30)  # over all directions, estimated
        sharpness = sam_sharpness(objective, rho=0.05)  # how much the loss can grow within 0.05 of the weights
        print(
            f'{wrong:>12.0%}  {sharpness.loss:>7.4f}  {eigenvalue:>18.2f}  '
            f'{f"{curvature.value:.1f} ± {curvature.stderr:.1f}":>14}  {sharpness.value:>13.5f}'
        )


if __name__ == '__main__':
    main()

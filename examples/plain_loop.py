"""SGD against SAM in a training loop of your own, without a trainer.

Run: python examples/plain_loop.py
Time: about 15 seconds.

Both networks start with the same weights and see the same batches of digits, of which 40 % have a wrong label. SGD
memorises wrong labels, SAM does not, at the price of a second pass (forward and backward) in every step. Stopping SGD
early helps against wrong labels too: the README compares all three. docs/plain_pytorch.md has the other ways to take a
step, fp16, gradient accumulation and saving.
"""

from __future__ import annotations

import torch
from noisy_digits import noisy_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from composer_sam import SAM, SharpnessAwareOptimizer

EPOCHS = 60
TRAIN, TEST = noisy_digits()


def sgd_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """Take an ordinary step."""
    optimizer.zero_grad()
    cross_entropy(model(images), labels).backward()
    optimizer.step()


def sam_step(model: nn.Module, optimizer: SharpnessAwareOptimizer, images: Tensor, labels: Tensor) -> None:
    """Take a step of SAM: the same body, but once per pass, and the step is taken when the loop ends."""
    for _ in optimizer.passes():  # pass 0 is at the weights, pass 1 at the worst weights within rho
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()


def train(name: str) -> None:
    """Train one network, with or without SAM, and print the result."""
    torch.manual_seed(0)  # the weights and the order of the batches
    loader = DataLoader(TRAIN, batch_size=64, shuffle=True, drop_last=True)
    hidden = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(base, T_max=EPOCHS)

    # rho is the radius of the perturbation. With this one a network with random weights would learn almost nothing, so
    # the first epoch is plain SGD. A loop counts in steps, not in epochs: '21ba' is 21 steps (batches).
    optimizer = SharpnessAwareOptimizer(base, SAM(rho=0.5, start=f'{len(loader)}ba'), model)

    for _ in range(EPOCHS):
        for images, labels in loader:
            if name == 'SAM':
                sam_step(model, optimizer, images, labels)
            else:
                sgd_step(model, base, images, labels)
        scheduler.step()

    steps = EPOCHS * len(loader)
    print(
        f'{name}: test accuracy {accuracy(model, TEST):.1%}, '
        f'accuracy on the training labels {accuracy(model, TRAIN):.1%}, '
        f'{steps} steps, {steps + optimizer.steps_perturbed} passes'
    )


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Return the share of images whose label the model predicts."""
    images, labels = data.tensors
    return (model(images).argmax(dim=1) == labels).float().mean().item()


def main() -> None:
    train('SGD')
    train('SAM')


if __name__ == '__main__':
    main()

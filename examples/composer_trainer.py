"""SGD against SAM in Composer's Trainer, on images: SAM is one entry in `algorithms`.

Run: python examples/composer_trainer.py
Time: about 30 seconds.

Both networks start with the same weights and see the same batches of digits, of which 40 % have a wrong label. SGD
memorises wrong labels, SAM does not, at the price of a second pass (forward and backward) in every step. Stopping SGD
early helps against wrong labels too: the README compares all three.
"""

from __future__ import annotations

import torch
from composer import Algorithm, Trainer
from composer.models import ComposerClassifier
from composer.optim import CosineAnnealingScheduler
from composer.utils import reproducibility
from noisy_digits import noisy_digits
from torch import nn
from torch.utils.data import DataLoader

from composer_sam import SAM, SharpnessAwareOptimizer


def network() -> nn.Module:
    """Return a small convolutional network. Only the first pass of a step updates the statistics of its BatchNorm."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def train(name: str, algorithms: list[Algorithm]) -> None:
    """Train one network and print its accuracy on the test images."""
    reproducibility.seed_all(17)  # the weights; the order of the batches is that of the Trainer's seed
    train_set, test_set = noisy_digits()
    model = ComposerClassifier(network(), num_classes=10)
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        schedulers=CosineAnnealingScheduler(),
        train_dataloader=DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True),
        eval_dataloader=DataLoader(test_set, batch_size=450),
        max_duration='40ep',
        eval_interval='40ep',
        algorithms=algorithms,
        seed=17,
        device='cpu',
        progress_bar=False,
    )
    trainer.fit()

    accuracy = trainer.state.eval_metrics['eval']['MulticlassAccuracy'].compute().item()
    steps = trainer.state.timestamp.batch.value
    (optimizer,) = trainer.state.optimizers  # SAM has put a wrapper around SGD
    perturbed = optimizer.steps_perturbed if isinstance(optimizer, SharpnessAwareOptimizer) else 0
    print(f'{name}: test accuracy {accuracy:.1%}, {steps} steps, {steps + perturbed} passes')
    trainer.close()


def main() -> None:
    train('SGD', [])
    # rho is the radius of the perturbation. With this one a network with random weights would learn almost nothing, so
    # the first epoch is plain SGD.
    train('SAM', [SAM(rho=0.5, start='1ep')])


if __name__ == '__main__':
    main()

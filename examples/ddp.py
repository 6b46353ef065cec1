"""SAM under DistributedDataParallel: each process perturbs by its own gradient, and all keep the same weights.

Run: torchrun --standalone --nproc_per_node 2 examples/ddp.py
Run: composer -n 2 examples/ddp.py
Time: about 15 seconds.

Both launchers start the program once per process and set the same environment variables (RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT), so the program need not know which one it was. Composer's Trainer wraps the model by itself: there, SAM is
one entry in `algorithms`, as in composer_trainer.py.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from noisy_digits import noisy_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from composer_sam import SAM, SharpnessAwareOptimizer

EPOCHS = 8


def same_on_all_ranks(model: nn.Module) -> bool:
    """Return whether all processes have the same weights, bit for bit."""
    bits = nn.utils.parameters_to_vector(model.parameters()).detach().view(torch.int32)
    gathered = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, bits)
    return all(torch.equal(bits, others) for others in gathered)


def main() -> None:
    dist.init_process_group('gloo')  # on GPUs 'nccl', and model and batches on the GPU whose number is in LOCAL_RANK
    torch.manual_seed(0)
    train_set, test_set = noisy_digits()
    sampler = DistributedSampler(train_set, drop_last=True)  # every process trains on its own part of the images
    loader = DataLoader(train_set, batch_size=32, sampler=sampler, drop_last=True)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    # Wrap the network first, and give the wrapped one to the optimizer. SAM then leaves out the exchange of the first
    # gradient, which is needed for the perturbation only, and sends as much as plain SGD does.
    model = DistributedDataParallel(network)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SharpnessAwareOptimizer(base, SAM(rho=0.2), model)

    perturbed, stepped = [], []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for batch, (images, labels) in enumerate(loader, start=1):
            for number in optimizer.passes():
                if number == 1 and batch == len(loader):  # the last step of an epoch: the weights are perturbed now
                    perturbed.append(same_on_all_ranks(network))
                optimizer.zero_grad()
                cross_entropy(model(images), labels).backward()
        stepped.append(same_on_all_ranks(network))

    if dist.get_rank() == 0:
        images, labels = test_set.tensors
        accuracy = (network(images).argmax(dim=1) == labels).float().mean().item()
        print(f'{dist.get_world_size()} ranks, {optimizer.steps_perturbed} steps of SAM, test accuracy {accuracy:.1%}')
        print(f'perturbed weights are the same on all ranks: {sum(perturbed)} of {EPOCHS} times')
        print(f'weights after a step are bit-identical on all ranks: {sum(stepped)} of {EPOCHS} times')
    dist.destroy_process_group()


if __name__ == '__main__':
    main()

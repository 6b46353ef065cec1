"""Diagnostics on two ranks: the numbers of one process with all samples, the same on both ranks, and no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from problem import Network, batches
from ranks import gathered, two_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from composer_sam.diagnostics import (
    MEASURES,
    Objective,
    average_sharpness,
    measure,
    sam_sharpness,
    spectral_density,
    top_eigenvalues,
    trace,
)
from composer_sam.trainers.composer import SharpnessMonitor

mse = nn.functional.mse_loss


def shares() -> list[list[tuple[Tensor, Tensor]]]:
    """Every rank's samples: not equally many."""
    return [batches(rank, 3)[: 3 - rank] for rank in range(2)]


def everything(model: nn.Module) -> list[Any]:
    gradients = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
    tensors = [value.tolist() for value in model.state_dict().values()]
    return [gradients, tensors, [module.training for module in model.modules()], torch.get_rng_state().tolist()]


def assert_equal_on_ranks(numbers: list[float]) -> None:
    first, *others = gathered(torch.tensor(numbers, dtype=torch.float64))
    assert all(torch.equal(first, other) for other in others), (first, others)


@two_ranks
def test_ranks_measure_what_one_process_measures_on_the_union() -> None:
    """To the last bit the same on both ranks."""
    model = DistributedDataParallel(Network())
    own, union = shares()[dist.get_rank()], [batch for share in shares() for batch in share]
    options: dict[str, Any] = {'k': 2, 'probes': 12, 'steps': 5, 'tol': 1e-8}
    found, expected = measure(model, mse, own, **options), measure(Network(), mse, union, **options)
    assert found.samples == expected.samples
    for name in MEASURES:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-7), name
    numbers = [value for name, value in found.as_dict().items() if name != 'seconds']
    average = average_sharpness(model, mse, own, draws=3)
    assert average.value == pytest.approx(average_sharpness(Network(), mse, union, draws=3).value, rel=1e-7)
    density = spectral_density(model, mse, own, steps=5, probes=2)
    assert_equal_on_ranks([*numbers, average.value, *density.nodes, *density.density])


@two_ranks
def test_m_sharpness_averages_the_groups_of_all_ranks() -> None:
    own = shares()[dist.get_rank()]
    found = sam_sharpness(DistributedDataParallel(Network()), mse, own, 0.2, m=5, steps=3)
    alone = [sam_sharpness(Network(), mse, share, 0.2, m=5, steps=3) for share in shares()]
    counts = [Objective(Network(), mse, share).samples for share in shares()]
    expected = sum(a.value * c for a, c in zip(alone, counts, strict=True)) / sum(counts)
    assert found.value == pytest.approx(expected, rel=1e-10)
    assert_equal_on_ranks([found.value, found.first_order, found.loss])


@two_ranks
def test_a_rank_may_have_no_samples_of_its_own() -> None:
    own = shares()[0] if dist.get_rank() == 0 else []
    found = top_eigenvalues(DistributedDataParallel(Network()), mse, own).values
    assert found == pytest.approx(top_eigenvalues(Network(), mse, shares()[0]).values, rel=1e-5)
    with pytest.raises(ValueError, match='at least one sample'):
        Objective(DistributedDataParallel(Network()), mse, [])


@two_ranks
def test_a_plain_model_is_summed_over_a_process_group_only_if_given() -> None:
    own, union = shares()[dist.get_rank()], [batch for share in shares() for batch in share]
    alone = Objective(Network(), mse, own)
    assert alone.value() == pytest.approx(Objective(Network(), mse, own).value())
    together = Objective(Network(), mse, own, process_group=dist.group.WORLD)
    assert together.value() == pytest.approx(Objective(Network(), mse, union).value(), rel=1e-12)


@two_ranks
def test_batchnorm_uses_rank_zeros_statistics_and_every_rank_keeps_its_own() -> None:
    """DistributedDataParallel hands out rank 0's buffers in its forwards."""
    norm = nn.BatchNorm1d(6).double()
    model = DistributedDataParallel(nn.Sequential(norm, Network()))
    assert norm.running_mean is not None
    norm.running_mean.fill_(float(dist.get_rank()))
    before = everything(model)
    found = Objective(model, mse, shares()[dist.get_rank()]).value()
    assert everything(model) == before
    expected = nn.Sequential(nn.BatchNorm1d(6).double(), Network())
    assert found == pytest.approx(
        Objective(expected, mse, [batch for share in shares() for batch in share]).value(), rel=1e-12
    )


@two_ranks
def test_training_between_measurements_goes_on_bit_for_bit() -> None:
    results = []
    for measured in (False, True):
        model = DistributedDataParallel(copy.deepcopy(Network()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for x, y in batches(dist.get_rank(), 6):
            optimizer.zero_grad()
            mse(model(x), y).backward()
            before = everything(model)
            if measured:
                objective = Objective(model, mse, shares()[dist.get_rank()])
                top_eigenvalues(objective)
                trace(objective, probes=2)
                sam_sharpness(objective, steps=2)
            assert everything(model) == before
            optimizer.step()
        results.append(everything(model))
    assert results[0] == results[1]


@two_ranks
def test_the_monitor_logs_the_same_on_all_ranks_and_leaves_training_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(37, 6, generator=generator), torch.randint(3, (37,), generator=generator))
    ends, logs = [], []
    for monitors in ([], [SharpnessMonitor('1ep', samples=21, measures=MEASURES, probes=6, steps=2)]):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))
        model, logger = ComposerClassifier(net, num_classes=3), InMemoryLogger()
        trainer = Trainer(
            model=model,
            train_dataloader=DataLoader(data, batch_size=6, sampler=DistributedSampler(data), drop_last=True),
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            max_duration='2ep',
            seed=3,
            callbacks=monitors,
            loggers=[logger],
            device='cpu',
            progress_bar=False,
        )
        trainer.fit()
        assert isinstance(trainer.state.model, DistributedDataParallel)
        ends.append(everything(trainer.state.model))
        logs.append(logger)
    assert ends[0] == ends[1]
    numbers = {name: [value for _, value in logs[1].data[f'sharpness/{name}']] for name in MEASURES}
    assert all(len(values) == 2 for values in numbers.values())
    assert_equal_on_ranks([value for values in numbers.values() for value in values])
    chosen = [index * 37 // 21 for index in range(21)]
    x, y = (part[chosen] for part in data.tensors)
    # The other ranks have running statistics of their own, which nobody sees in evaluation or in a checkpoint.
    expected = measure(trainer.state.model.module, None, [(x, y)], measures=['top_eigenvalue', 'loss'])
    assert dist.get_rank() or numbers['top_eigenvalue'][-1] == pytest.approx(expected.top_eigenvalue, rel=1e-4)


@two_ranks
@pytest.mark.parametrize('kind', ['fsdp1', 'fsdp2', 'tensor parallel', 'inside'])
def test_sharded_models_are_refused_with_a_remedy(kind: str) -> None:
    message = 'sharded over processes .FSDP or DTensor.*load it into the plain model in one process'
    model: nn.Module = Network()
    if kind == 'fsdp1':
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device('cpu'))
    elif kind == 'fsdp2':
        fully_shard(model.first)
    elif kind == 'tensor parallel':
        mesh = init_device_mesh('cpu', (2,))
        model.first.weight = nn.Parameter(distribute_tensor(model.first.weight.detach(), mesh, [Shard(0)]))
    else:
        model = nn.Sequential(DistributedDataParallel(model))
        message = 'DistributedDataParallel lies inside the model: wrap the whole model'
    with pytest.raises(ValueError, match=message):
        Objective(model, mse, batches(0))


@two_ranks
def test_the_monitor_refuses_fsdp_before_training() -> None:
    from composer.utils.parallelism import FSDP2Config, ParallelismConfig

    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    for child in net.children():
        vars(child)['_fsdp_wrap'] = True
    model = ComposerClassifier(net, num_classes=3)
    data = TensorDataset(torch.randn(24, 6), torch.randint(3, (24,)))
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size=6, sampler=DistributedSampler(data)),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration='1ep',
        callbacks=[SharpnessMonitor()],
        parallelism_config=ParallelismConfig(fsdp2=FSDP2Config()),
        device='cpu',
        progress_bar=False,
    )
    with pytest.raises(ValueError, match='sharded over processes'):
        trainer.fit()
    assert trainer.state.timestamp.batch == 0

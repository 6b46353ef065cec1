"""The recipe for language models on two ranks: DistributedDataParallel, and FSDP2 by the recipe's own key."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from problem import flat
from ranks import gathered, two_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from composer_sam import SAM, SharpnessAwareOptimizer
from tests.language import build, data_and_model

pytest.importorskip('transformers')
STEPS = 5
DROPOUT = [f'model.config.{name}_pdrop=0.1' for name in ('embd', 'resid', 'attn')]


class Drawn(Callback):
    """The sequences that this rank was given, and the number of passes and the learning rate of each step."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.rates: list[float] = []
        self.passes: list[int] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        del logger
        self.batches.append(state.batch['input_ids'].clone())
        self.rates.append(state.optimizers[0].param_groups[0]['lr'])
        self.passes.append(0)

    def before_forward(self, state: State, logger: Logger) -> None:
        del state, logger
        self.passes[-1] += 1


def fit(*overrides: str) -> tuple[nn.Module, Drawn]:
    drawn = Drawn()
    trainer = build('sam', 'algorithms.sam.rho=0.3', f'max_duration={STEPS}ba', *overrides, callbacks=(drawn,))
    trainer.fit()
    return trainer.state.model, drawn


def assert_ranks_equal(model: nn.Module) -> None:
    weights = flat(model)
    assert all(torch.equal(weights, other) for other in gathered(weights)), 'the ranks hold different weights'


def average_of_ones() -> float:
    """What FSDP2's reduction of fp32 gradients makes of ones: gloo adds where it is asked for the average."""
    average = torch.zeros(1)
    dist.reduce_scatter_tensor(average, torch.ones(dist.get_world_size()), op=dist.ReduceOp.AVG)
    return average.item()


@two_ranks
def test_ddp_ranks_of_a_language_model_stay_bit_identical() -> None:
    """With dropout, clipping, micro-batches and recomputed activations."""
    settings = [*DROPOUT, 'device_train_microbatch_size=2', 'model.gradient_checkpointing=true']
    model, drawn = fit(*settings)
    assert drawn.passes == [4] * STEPS  # two passes over two micro-batches
    assert_ranks_equal(model)
    assert not torch.equal(*gathered(drawn.batches[0]))
    assert not torch.equal(flat(model), flat(data_and_model()[1]))


@two_ranks
def test_fsdp2_of_a_language_model_is_one_process_on_the_union() -> None:
    """With SGD, for Adam makes steps of what is rounding only. The blocks and the tied embeddings are sharded."""
    scale = average_of_ones()
    plain = ['optimizer.name=sgd', f'optimizer.lr={0.3 / scale}', 'optimizer.weight_decay=0.0']
    model, drawn = fit('parallelism={fsdp2: {}}', *plain, 'algorithms.gradient_clipping=null')
    assert drawn.passes == [2] * STEPS
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    sharded = [type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)]
    assert sum('GPT2Block' in name for name in sharded) == 2
    assert_ranks_equal(model)
    _, expected = data_and_model()
    assert not torch.equal(flat(model), flat(expected))
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(expected.parameters()), SAM(rho=0.3), expected)
    for tokens, lr in zip(drawn.batches, drawn.rates, strict=True):
        union = torch.cat(gathered(tokens))
        batch = {'input_ids': union, 'labels': union}

        def closure(batch: dict[str, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = expected.loss(expected(batch), batch)
            loss.backward()
            return loss

        optimizer.param_groups[0]['lr'] = scale * lr
        optimizer.step(closure)
    assert_close(flat(model), flat(expected), rtol=1e-4, atol=1e-6)

"""Hugging Face's Trainer on two ranks: DistributedDataParallel, and passes that are left unsynchronised."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip('transformers', reason="transformers is not installed: pip install 'composer-sam[transformers]'")
pytest.importorskip('accelerate', reason="accelerate is not installed: pip install 'composer-sam[transformers]'")

from problem import Network, batches, bits, closure_for, counted_reductions
from ranks import gathered, shared_folder, two_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from composer_sam import SharpnessAwareOptimizer
from composer_sam.engine.step import MEMORY_PREFIX
from composer_sam.methods.base import SharpnessAware
from composer_sam.trainers.transformers.memory import share_memory
from tests.conformance.parts import clipping
from tests.hosts.small_trainers import (
    CLIP,
    SIZE,
    At,
    Classifier,
    Inputs,
    RandomPlaces,
    arguments,
    counts_shifted_labels,
    fresh_accelerate,
    language_model,
    major_version,
    samples,
    sentences,
    state_of,
    trainer_of,
)
from tests.problems import BASES, made, same


@contextlib.contextmanager
def a_trainer(
    method: SharpnessAware, accumulate: int, model: nn.Module | None = None, data: Any = None, **options: Any
) -> Iterator[Any]:
    """A Trainer of both ranks."""
    with shared_folder() as folder, fresh_accelerate(), warnings.catch_warnings():
        # The Trainer has unused parameters looked for, and the small models have none.
        warnings.filterwarnings('ignore', 'find_unused_parameters=True was specified')
        args = arguments(folder, gradient_accumulation_steps=accumulate, ddp_backend='gloo', **options)
        yield trainer_of(method, args, samples(6 * accumulate) if data is None else data, model)


Loss = Callable[[nn.Module, Inputs, Sequence[Inputs]], torch.Tensor]


def by_passes(
    method: SharpnessAware, data: Sequence[Inputs], accumulate: int, whole: nn.Module, loss_of: Loss
) -> tuple[nn.Module, SharpnessAwareOptimizer]:
    """The same in a plain loop, with DistributedDataParallel's own no_sync."""
    model = DistributedDataParallel(whole)
    base = BASES['SGD'](model.parameters())
    base.register_step_pre_hook(clipping(model, CLIP))
    optimizer = SharpnessAwareOptimizer(base, method, model)
    for first in range(0, len(data), accumulate):
        window = data[first : first + accumulate]
        for number in optimizer.passes():
            optimizer.zero_grad()
            parts = [number.part(inputs) for inputs in window]
            for place, inputs in enumerate(parts, start=1):
                with contextlib.nullcontext() if place == len(window) else model.no_sync():
                    loss_of(model, inputs, parts).backward(create_graph=method.backwards_create_graph)
    return model, optimizer


def _classifiers_loss(model: nn.Module, inputs: Inputs, window: Sequence[Inputs]) -> torch.Tensor:
    return model(**inputs)['loss'] / len(window)


def assert_same_run(
    method: SharpnessAware,
    accumulate: int,
    made_model: Callable[[], nn.Module] = Classifier,
    data_of: Callable[[int], Any] = samples,
    loss_of: Loss = _classifiers_loss,
    **options: Any,
) -> None:
    with a_trainer(method, accumulate, made_model(), data_of(6 * accumulate), **options) as trainer:
        data = [dict(inputs) for inputs in trainer.get_train_dataloader()]
        assert len(data) == 3 * accumulate
        places = RandomPlaces()
        trainer.add_callback(places)
        trainer.train()
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        torch.set_rng_state(places.places[0])
        model, optimizer = by_passes(method, data, accumulate, made_model(), loss_of)
        assert same(trainer.model_wrapped.state_dict(), model.state_dict())
        assert same(state_of(trainer.optimizer), state_of(optimizer))
        assert trainer.sharpness_aware_optimizer.steps_perturbed == optimizer.steps_perturbed > 0
        for parameter in trainer.model.parameters():
            first, *others = gathered(parameter.detach())
            assert all(torch.equal(first, other) for other in others), 'the ranks hold different weights'


@two_ranks
@pytest.mark.parametrize('name', ['SAM', 'WSAM', 'GAM', 'MSAM', 'LookSAM', 'ASAM', 'SGDHess', 'FunctionalSAM'])
def test_its_steps_are_those_of_a_plain_loop_and_ranks_stay_equal(name: str) -> None:
    for accumulate in (1, 2):
        assert_same_run(made(name), accumulate)


@two_ranks
@pytest.mark.parametrize('fraction', [1.0, 0.5])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_first_pass_may_be_synchronised(accumulate: int, fraction: float) -> None:
    """Also one over parts, which comes before micro-batches whose gradients are left unsynchronised."""
    assert_same_run(made('SAM', sync_first_pass=True, ascent_fraction=fraction), accumulate)


@two_ranks
def test_a_first_pass_over_parts_may_be_left_unsynchronised() -> None:
    for accumulate in (1, 2):
        assert_same_run(made('SAM', ascent_fraction=0.5), accumulate)


@two_ranks
@pytest.mark.parametrize('fraction', [1.0, 0.5])
def test_a_language_model_counts_the_tokens_of_all_ranks(fraction: float) -> None:
    def loss_of(model: nn.Module, inputs: Inputs, window: Sequence[Inputs]) -> torch.Tensor:
        shift = 1 if counts_shifted_labels() else 0
        items = torch.stack([(other['labels'][..., shift:] != -100).sum() for other in window]).sum()
        dist.all_reduce(items)
        return model(**inputs, num_items_in_batch=items)['loss'] * dist.get_world_size()

    method = made('SAM', rho=0.1, epsilon=0.5, ascent_fraction=fraction)
    data_of: Any = lambda steps: sentences(steps * SIZE)  # noqa: E731
    assert_same_run(method, 2, language_model, data_of, loss_of, average_tokens_across_devices=True)


@two_ranks
@pytest.mark.parametrize('fraction', [1.0, 0.5])
def test_the_first_pass_is_synchronised_only_if_that_is_asked_for(fraction: float) -> None:
    for sync, averaged in ((False, 1), (True, 2)):
        method = made('SAM', sync_first_pass=sync, ascent_fraction=fraction)
        assert count_reductions(method) == 3 * averaged


def count_reductions(method: SharpnessAware) -> int:
    """The number of times that gradients are averaged in three steps."""
    with contextlib.ExitStack() as stack, a_trainer(method, 2) as trainer:
        reductions: list[str] = []

        def begin(*_: Any) -> None:
            nonlocal reductions
            reductions = stack.enter_context(counted_reductions(trainer.model_wrapped))

        trainer.add_callback(At('on_train_begin', begin))
        trainer.train()
        return reductions.count('gradients')


if major_version() > 4:  # transformers 4 cannot load an optimizer on several ranks of CPUs

    @two_ranks
    @pytest.mark.parametrize('name', ['SAM', 'LookSAM'])
    def test_a_resumed_run_ends_in_the_same_bits(name: str) -> None:
        found: list[Any] = []
        options: dict[str, Any] = {'num_train_epochs': 2, 'save_strategy': 'steps', 'save_steps': 2}
        with a_trainer(made(name), 2, **options) as trainer:
            torch.manual_seed(3)
            trainer.train()
            found.append(trainer.model.state_dict())
            again = trainer_of(made(name), trainer.args, trainer.train_dataset, Classifier(seed=5))
            torch.manual_seed(99)
            again.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / 'checkpoint-2'))
            assert again.sharpness_aware_optimizer.steps_taken == 4
            found.append(again.model.state_dict())
            assert same(*found)


@two_ranks
def test_an_error_on_both_ranks_leaves_no_trace_and_training_goes_on() -> None:
    for at in range(1, 5):
        with a_trainer(made('SAM'), 2) as trainer:
            trainer.model.counted.fail_at = at
            before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
            with pytest.raises(MemoryError):
                trainer.train()
            assert same(dict(trainer.model.state_dict()), before)
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
            trainer.train()
            assert trainer.sharpness_aware_optimizer.steps_taken == 3
            for parameter in trainer.model.parameters():
                assert torch.equal(*gathered(parameter.detach()))


@two_ranks
@pytest.mark.parametrize('name', ['LookSAM', 'VaSSO', 'AESAM'])
def test_with_fsdp2_all_ranks_get_what_the_first_one_has_loaded_of_a_whole_checkpoint(name: str) -> None:
    found: list[list[torch.Tensor]] = []
    data = batches(dist.get_rank(), 6)
    for breaks in (False, True):
        model = Network()
        fully_shard(model)
        optimizer = SharpnessAwareOptimizer(BASES['AdamW'](model.parameters()), made(name), model)
        for step, batch in enumerate(data):
            if breaks and step == 3:
                _as_after_loading(optimizer)
                share_memory(optimizer.base_optimizer)
            optimizer.step(closure_for(optimizer, model, batch))
        found.append(bits(model))
    assert same(*found)


def _as_after_loading(optimizer: SharpnessAwareOptimizer) -> None:
    """torch gives the first rank whole tensors of what a fresh optimizer has no place for, and the others nothing."""
    for state in optimizer.state.values():
        for key in [key for key in state if key.startswith(MEMORY_PREFIX)]:
            value = state.pop(key)
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if dist.get_rank() == 0:
                state[key] = whole

"""trl's SFTTrainer with a method: its steps are those of a plain loop, and its metrics count once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip('trl', reason='trl is not installed')
pytest.importorskip('datasets', reason='datasets is not installed')

from datasets import Dataset  # pyright: ignore[reportMissingImports]
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

from composer_sam import SAM
from composer_sam.methods.base import SharpnessAware
from composer_sam.trainers.transformers import SharpnessAwareMixin
from tests.hosts.small_trainers import (
    At,
    Inputs,
    assert_same_run,
    base_of,
    counts_shifted_labels,
    fresh_accelerate,
    in_order,
)
from tests.problems import made

# trl 1 uses an old name of transformers'.
pytestmark = pytest.mark.filterwarnings('ignore:.gradient_checkpointing. is deprecated:FutureWarning')

WORDS = '<pad> <eos> the cat dog sees likes a small big house tree and runs to it'.split()  # noqa: SIM905
SENTENCES = ['the cat sees a dog', 'a small dog likes the big house and runs to it', 'the tree', 'it runs'] * 6


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    with fresh_accelerate():
        yield


class SharpSFTTrainer(SharpnessAwareMixin, SFTTrainer):
    """As in the documentation."""


def model() -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes: dict[str, Any] = {'vocab_size': len(WORDS), 'n_positions': 32, 'n_embd': 16, 'n_layer': 2, 'n_head': 2}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0))


def tokenizer() -> PreTrainedTokenizerFast:
    """One of our own: none is downloaded."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token='<pad>'))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<pad>', eos_token='<eos>')


def trainer_of(folder: Path, method: SharpnessAware | None, **options: Any) -> Any:
    quiet: dict[str, Any] = {'use_cpu': True, 'bf16': False, 'report_to': [], 'disable_tqdm': True}
    quiet |= {'dataloader_pin_memory': False, 'save_strategy': 'no', 'per_device_train_batch_size': 4}
    quiet |= {'num_train_epochs': 1, 'gradient_accumulation_steps': 2, 'max_grad_norm': 0.05, 'learning_rate': 1e-2}
    args = SFTConfig(str(folder), **{**quiet, 'lr_scheduler_type': 'constant', 'logging_steps': 1, **options})
    data = Dataset.from_dict({'text': SENTENCES})
    kind = in_order(SFTTrainer if method is None else SharpSFTTrainer)
    extra = {} if method is None else {'method': method}
    trainer = kind(model=model(), args=args, train_dataset=data, processing_class=tokenizer(), **extra)
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.mark.parametrize('name', ['SAM', 'GAM'])
def test_its_steps_are_those_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    method, trainer = made(name), trainer_of(tmp_path, made(name))
    twin = trainer_of(tmp_path, None)  # its loss, of a copy of the model

    def loss_of(model: nn.Module, inputs: Inputs, window: Sequence[Inputs]) -> Tensor:
        shift = 1 if counts_shifted_labels() else 0
        items = torch.stack([(other['labels'][..., shift:] != -100).sum() for other in window]).sum()
        return twin.compute_loss(model, dict(inputs), num_items_in_batch=items)

    data = [dict(inputs) for inputs in trainer.get_train_dataloader()]
    base = base_of(twin.model, trainer.args)
    losses, _ = assert_same_run(trainer, method, twin.model, base, data=data, loss_of=loss_of, clip=0.05)
    logs = [entry for entry in trainer.state.log_history if 'loss' in entry]
    assert [entry['loss'] for entry in logs] == pytest.approx([loss.item() for loss in losses], abs=5e-5)


@pytest.mark.parametrize('values', [{}, {'ascent_fraction': 0.5}], ids=['whole', 'part'])
def test_its_metrics_count_once(values: dict[str, Any], tmp_path: Path) -> None:
    logs: list[Any] = []
    counts: list[int] = []
    for method in (None, SAM(rho=0.1, **values)):
        trainer = trainer_of(tmp_path, method)
        metrics = trainer._metrics['train']
        trainer.add_callback(
            At('on_step_end', lambda *_, metrics=metrics: counts.append(len(metrics['mean_token_accuracy'])))
        )
        torch.manual_seed(3)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if 'loss' in entry])
    plain, sharp = logs
    assert [entry['num_tokens'] for entry in sharp] == [entry['num_tokens'] for entry in plain]
    assert counts == [2] * 6  # micro-batches in each of three steps
    if not values:  # the first step is at the same weights in both
        assert sharp[0]['mean_token_accuracy'] == plain[0]['mean_token_accuracy']
        assert sharp[0]['loss'] == plain[0]['loss'] < sharp[0]['sam/perturbed_loss']

"""LLM Foundry's own training with ``algorithms: {sam: {...}}`` in its YAML."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    foundry = pytest.importorskip('llmfoundry.command_utils', reason='llm-foundry is not installed')
    algorithms = pytest.importorskip('llmfoundry.registry').algorithms
    builders = pytest.importorskip('llmfoundry.utils.builders')
    dataloader = pytest.importorskip('llmfoundry.data.dataloader')
    streaming = pytest.importorskip('streaming')

from composer import ComposerModel, Trainer
from composer.optim import ConstantWithWarmupScheduler, DecoupledAdamW, LinearScheduler
from composer.utils import reproducibility
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from composer_sam import SAM, SharpnessAwareOptimizer, registry
from composer_sam.methods.base import SharpnessAware

# What LLM Foundry and its libraries warn of; ours are in the log.
pytestmark = pytest.mark.filterwarnings('ignore')

NAMES = {method.__module__.rpartition('.')[2]: method for method in registry.values()}
WORDS = '<unk> <eos> <pad> the cat dog sees likes a small big house tree and runs to it'.split()  # noqa: SIM905
STEPS = 4
YAML = f"""
model:
  name: mpt_causal_lm
  init_device: cpu
  d_model: 16
  n_heads: 2
  n_layers: 2
  expansion_ratio: 2
  max_seq_len: 16
  vocab_size: {len(WORDS)}
  resid_pdrop: 0.1
  attn_config: {{attn_impl: torch}}
  loss_fn: torch_crossentropy
tokenizer: {{name: FOLDER/words, kwargs: {{model_max_length: 16}}}}
optimizer: {{name: decoupled_adamw, lr: 0.01, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.0}}
scheduler: {{name: constant_with_warmup, t_warmup: 1ba}}
train_loader:
  name: text
  dataset: {{local: FOLDER/text, split: train, shuffle: true, max_seq_len: 16}}
  drop_last: true
  num_workers: 0
  prefetch_factor: null
  persistent_workers: false
run_name: tiny
seed: 3
precision: fp32
max_seq_len: 16
max_duration: {STEPS}ba
global_train_batch_size: 8
device_train_microbatch_size: 4
device_eval_batch_size: 8
eval_interval: 0
log_to_console: false
log_config: false
python_log_level: null
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of words, text in MDS shards, and the configuration of a GPT-2."""
    made = tmp_path_factory.mktemp('foundry')
    rules: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token='<unk>'))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {'unk_token': '<unk>', 'bos_token': '<eos>', 'eos_token': '<eos>', 'pad_token': '<pad>'}
    PreTrainedTokenizerFast(tokenizer_object=rules, **special).save_pretrained(made / 'words')
    draw = random.Random(0)
    with streaming.MDSWriter(out=str(made / 'text' / 'train'), columns={'text': 'str'}) as shards:
        for _ in range(64):
            shards.write({'text': ' '.join(draw.choices(WORDS[3:], k=draw.randint(6, 16)))})
    sizes: dict[str, Any] = {'vocab_size': len(WORDS), 'n_positions': 16, 'n_embd': 16, 'n_layer': 2, 'n_head': 2}
    GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=2).save_pretrained(made / 'gpt2')
    return made


def configured(folder: Path, **keys: Any) -> dict[str, Any]:
    made: Any = OmegaConf.to_container(OmegaConf.create(YAML.replace('FOLDER', str(folder))))
    return {**made, **keys}


def gpt2(folder: Path) -> dict[str, Any]:
    name = {'name': 'hf_causal_lm', 'pretrained': False, 'pretrained_model_name_or_path': str(folder / 'gpt2')}
    return {**name, 'use_flash_attention_2': False, 'init_device': 'cpu'}


def weights(trainer: Trainer) -> Tensor:
    found = nn.utils.parameters_to_vector(trainer.state.model.parameters()).detach().clone()
    trainer.close()
    return found


def trained(folder: Path, **keys: Any) -> Tensor:
    return weights(foundry.train(OmegaConf.create(configured(folder, **keys))))


def trained_by_composer(folder: Path, method: SharpnessAware, **keys: Any) -> Tensor:
    """The same run, with a Trainer and a method of our own making."""
    keys = configured(folder, **keys)
    reproducibility.seed_all(keys['seed'])
    tokenizer = builders.build_tokenizer(keys['tokenizer']['name'], keys['tokenizer']['kwargs'])
    text = dataloader.build_dataloader(keys['train_loader'], tokenizer, 8)
    model = builders.build_composer_model(name=keys['model'].pop('name'), cfg=keys['model'], tokenizer=tokenizer)
    base = DecoupledAdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    trainer = Trainer(
        model=model,
        train_dataloader=text,
        optimizers=base,
        schedulers=ConstantWithWarmupScheduler('1ba'),
        algorithms=[method],  # pyright: ignore[reportArgumentType]
        max_duration=f'{STEPS}ba',
        seed=keys['seed'],
        device_train_microbatch_size=4,
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
    )
    trainer.fit()
    return weights(trainer)


@pytest.fixture
def forwards() -> Iterator[list[int]]:
    """One entry per forward of the model."""
    seen: list[int] = []

    def count(module: nn.Module, _: Any) -> None:
        if isinstance(module, ComposerModel):
            seen.append(1)

    hook = nn.modules.module.register_module_forward_pre_hook(count)
    yield seen
    hook.remove()


def test_the_installed_entry_points_are_the_methods() -> None:
    assert {name: algorithms.get(name) for name in NAMES} == NAMES
    built = builders.build_algorithm('sam', {'rho': 0.1, 'interval': 2})
    assert repr(built) == repr(SAM(rho=0.1, interval=2))
    with pytest.raises(ValueError, match='rho must be a finite number > 0, got -1'):
        builders.build_algorithm('sam', {'rho': -1})


def test_the_command_takes_the_yaml_and_dotted_overrides(folder: Path, tmp_path: Path, forwards: list[int]) -> None:
    clipping = {'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': 0.5}}
    file = tmp_path / 'tiny.yaml'
    OmegaConf.save(OmegaConf.create(configured(folder, algorithms={'sam': {'rho': 0.05}, **clipping})), file)
    trainer = foundry.train_from_yaml(str(file), ['algorithms.sam.rho=0.1', 'algorithms.sam.interval=2'])
    (optimizer,) = trainer.state.optimizers
    assert isinstance(optimizer, SharpnessAwareOptimizer)
    assert repr(optimizer.method) == repr(SAM(rho=0.1, interval=2))
    assert optimizer.steps_perturbed == STEPS // 2
    micro_batches = 2
    assert len(forwards) == (STEPS + STEPS // 2) * micro_batches
    found = weights(trainer)
    assert not torch.equal(found, trained(folder, algorithms=clipping))
    sam = {'sam': {'rho': 0.1, 'interval': 2}}
    assert not torch.equal(found, trained(folder, algorithms=sam))
    assert torch.equal(found, trained(folder, algorithms={**clipping, **sam}))


def test_two_methods_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r'the optimizer is wrapped already, with SAM\(\)'):
        trained(folder, algorithms={'sam': {}, 'gsam': {}})


@pytest.mark.parametrize('name', NAMES)
def test_a_run_is_that_of_composers_trainer(folder: Path, name: str) -> None:
    found = trained(folder, algorithms={name: {'interval': 2}})
    assert torch.equal(found, trained_by_composer(folder, NAMES[name](interval=2)))
    assert not torch.equal(found, trained(folder))


def test_models_of_transformers(folder: Path) -> None:
    found = trained(folder, algorithms={'sam': {'rho': 0.1}}, model=gpt2(folder))
    assert torch.equal(found, trained_by_composer(folder, SAM(rho=0.1), model=gpt2(folder)))
    assert not torch.equal(found, trained(folder, model=gpt2(folder)))


@pytest.mark.parametrize('optimizer', ['decoupled_lionw', 'clip_lion', 'adalr_lion'])
def test_the_optimizers_of_llm_foundry(folder: Path, optimizer: str) -> None:
    keys = {'optimizer': {'name': optimizer, 'lr': 0.01, 'betas': [0.9, 0.95], 'weight_decay': 0.0}}
    monitor = {'optimizer_monitor': {'batch_log_interval': 1}}
    found = trained(folder, algorithms={'sam': {'rho': 0.5}}, callbacks=monitor, **keys)
    assert found.isfinite().all()
    assert not torch.equal(found, trained(folder, **keys))


@pytest.mark.parametrize('method', [{'sam': {'interval': 2}}, {'msam': {}}], ids=str)
def test_autoresume_goes_on_as_if_there_was_no_stop(
    folder: Path, tmp_path: Path, method: dict[str, Any], forwards: list[int]
) -> None:
    # Without dropout: LLM Foundry's plain runs draw other masks after they are resumed.
    model = {**configured(folder)['model'], 'resid_pdrop': 0.0}
    keys = {'algorithms': method, 'model': model}
    saved = {**keys, 'save_folder': str(tmp_path), 'save_interval': '1ba', 'autoresume': True}
    trained(folder, **saved, max_duration=f'{STEPS - 1}ba')
    before = len(forwards)
    resumed = trained(folder, **saved)
    of_the_rest = len(forwards) - before
    assert torch.equal(resumed, trained(folder, **keys))
    assert of_the_rest < before


def test_a_method_of_ones_own_from_code_paths(folder: Path, tmp_path: Path) -> None:
    (tmp_path / 'mine.py').write_text(
        'import composer_sam.methods.llm_foundry\n'
        'from composer.optim import LinearScheduler\n'
        'from composer_sam import SAM\n'
        'from llmfoundry.registry import algorithms\n\n'
        "@algorithms.register('mine')\n"
        'class Mine(SAM):\n'
        '    def __init__(self, **options):\n'
        "        super().__init__(**options, schedules={'rho': LinearScheduler()})\n"
    )
    found = trained(folder, algorithms={'mine': {'rho': 0.1}}, code_paths=[str(tmp_path / 'mine.py')])
    scheduled = SAM(rho=0.1, schedules={'rho': LinearScheduler()})
    assert torch.equal(found, trained_by_composer(folder, scheduled))
    assert not torch.equal(found, trained(folder, algorithms={'sam': {'rho': 0.1}}))

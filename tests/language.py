"""Texts, tokenizers and recipes for language models so small that a run takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from composer import Callback, Trainer

from composer_sam.recipes import build_trainer, load_recipe
from composer_sam.recipes.data import Data, build_data
from composer_sam.recipes.networks import build_network
from composer_sam.recipes.schema import Text

__all__ = ['LM', 'TINY', 'build', 'data_and_model', 'folder_of', 'text', 'weights', 'words']

LM = Path(__file__).parents[1] / 'yamls' / 'lm'
TINY = [
    *('data.max_bytes=20000', 'data.sequence_length=32', 'data.batch_size=8', 'data.eval_batch_size=16'),
    *('model.config.n_embd=16', 'model.config.n_layer=2', 'model.config.n_head=2'),
    *('device_train_microbatch_size=8', 'eval_interval=0', 'optimizer.lr=0.01', 'scheduler.t_warmup=1ba'),
]


def build(name: str, *overrides: str, callbacks: tuple[Callback, ...] = (), overlays: tuple[Path, ...] = ()) -> Trainer:
    """The trainer of one of the recipes in yamls/lm."""
    return build_trainer(load_recipe(LM / f'{name}.yaml', overlays, [*TINY, *overrides]), callbacks)


def data_and_model(*overrides: str) -> tuple[Data, Any]:
    """The data and the network of the recipe adamw, for a Trainer of one's own."""
    recipe = load_recipe(LM / 'adamw.yaml', overrides=[*TINY, *overrides])
    data = build_data(recipe.data, recipe.seed)
    torch.manual_seed(recipe.seed)
    return data, build_network(recipe.model, data)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.state.model.named_parameters()}


def text(**keys: Any) -> Text:
    return Text.model_validate({'name': 'text', 'batch_size': 2, 'sequence_length': 8, 'max_bytes': 50_000, **keys})


def folder_of(path: Path, **files: str) -> str:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / f'{name}.txt').write_text(content)
    return str(path)


def words(path: Path, eos: bool = True, first: int = 0) -> str:
    """A tokenizer of words, in the format of transformers."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: first + index for index, word in enumerate(('[UNK]', 'one', 'two', 'three', '<end>'))}
    rules: Any = Tokenizer(models.WordLevel(vocabulary, unk_token='[UNK]'))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules, unk_token='[UNK]', **({'eos_token': '<end>'} if eos else {})
    ).save_pretrained(str(path))
    return str(path)

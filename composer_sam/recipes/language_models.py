"""Causal language models of transformers that a recipe can name, as Composer models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from composer.metrics import LanguageCrossEntropy, LanguagePerplexity, MaskedAccuracy
from composer.models import HuggingFaceModel
from torch import nn

from composer_sam.extras import extra
from composer_sam.recipes.errors import RecipeError, unknown
from composer_sam.recipes.sections import DataSection, ModelSection
from composer_sam.recipes.text_schema import CausalLM, Text
from composer_sam.recipes.tokenizers import Tokenizer, find_tokenizer

__all__ = ['build_language_model', 'check_language_model']


def check_language_model(data: DataSection, model: ModelSection) -> None:
    """Check that text and a language model go together, and that they fit each other; no text or weights are read.

    Raises:
        RecipeError: only one of them is of this kind, the configuration is wrong, or it does not fit the text.
    """
    if isinstance(model, CausalLM) and isinstance(data, Text):
        _config(model, find_tokenizer(data.tokenizer), data.sequence_length)
    elif isinstance(model, CausalLM):
        raise RecipeError(f"model.name: 'causal_lm' takes text, and data.name is {data.name!r}; choose 'text'")
    elif isinstance(data, Text):
        raise RecipeError(f"model.name: {model.name!r} takes no text, and data.name is 'text'; choose 'causal_lm'")


def build_language_model(section: CausalLM, tokenizer: Tokenizer, length: int) -> HuggingFaceModel:
    """Build the network of the section ``model`` of a recipe.

    New weights are drawn from torch's global random stream, which must be seeded before.

    Args:
        section: the section.
        tokenizer: the tokenizer of the text.
        length: the number of tokens of a sequence.

    Raises:
        RecipeError: the configuration is wrong, it does not fit the text, or the weights cannot be read.
    """
    config = _config(section, tokenizer, length)
    network = _new(section, config) if section.root is None else _loaded(section, section.root, config)
    # transformers warns of classes whose names do not say it.
    if getattr(network, 'loss_type', None) is None:
        network.loss_type = 'ForCausalLM'
    if section.gradient_checkpointing:
        network.gradient_checkpointing_enable({'use_reentrant': False})
    for block in _blocks(network):
        block._fsdp_wrap = True  # pyright: ignore[reportArgumentType]  # Composer's FSDP shards marked modules
    return HuggingFaceModel(
        network,
        tokenizer.pretrained,
        use_logits=True,
        # None in training: they would take another look at every token's scores in every step.
        eval_metrics=[LanguageCrossEntropy(), LanguagePerplexity(), MaskedAccuracy()],
    )


def _config(section: CausalLM, tokenizer: Tokenizer, length: int) -> Any:
    """Return the configuration of transformers; the vocabulary and the positions are at least those of the text."""
    if (section.config is None) == (section.root is None):
        raise RecipeError(
            'model.config: is required, such as {architecture: gpt2}, or the folder of a network as model.root'
            if section.config is None
            else f'model.root: {section.root!r} has a configuration of its own, and model.config is given too; '
            'remove one of them (model.config=null)'
        )
    if section.root is not None:
        key, config = 'model.root', _stored_config(section.root)
    else:
        key, config = 'model.config', _new_config(section.config or {}, tokenizer, length)
    if config.vocab_size < tokenizer.size:
        raise RecipeError(
            f'{key}: vocab_size {config.vocab_size} is less than the {tokenizer.size} tokens of data.tokenizer; '
            'the network must know all of them'
        )
    positions = getattr(config, 'max_position_embeddings', None)  # None: a network that knows no largest position
    if isinstance(positions, int) and positions < length:
        raise RecipeError(
            f'data.sequence_length: {length} is more than the {positions} positions of the model '
            f'({_own_name(config, "max_position_embeddings")})'
        )
    config.use_cache = False  # what generation keeps of earlier tokens; training needs none of it
    return config


def _new_config(given: dict[str, Any], tokenizer: Tokenizer, length: int) -> Any:
    with extra('lm', 'a language model'):
        from transformers import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = given.get('architecture')
    if architecture is None:
        raise RecipeError('model.config.architecture: is required, such as gpt2 or llama')
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        known = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise unknown('architecture', 'model.config.architecture', architecture, str(architecture), known)
    kind: Any = CONFIG_MAPPING[architecture]
    try:
        default = kind()
    except Exception as error:  # one that is made of the configurations of its parts
        raise RecipeError(f'model.config.architecture: {architecture!r} has no defaults: {error}') from error
    known = set(default.to_dict()) | set(default.attribute_map)
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name == 'architecture':
            continue
        if name not in known:
            raise unknown('key', f'model.config.{name}', value, name, known)
        _check_kind(name, value, getattr(default, name, None))
        fields[_own_name(default, name)] = value
    fields.setdefault(_own_name(default, 'vocab_size'), tokenizer.size)
    if hasattr(default, 'max_position_embeddings'):
        fields.setdefault(_own_name(default, 'max_position_embeddings'), length)
    for special in ('bos_token_id', 'eos_token_id'):
        fields.setdefault(special, tokenizer.separator)
    try:
        return kind(**fields)
    except Exception as error:
        raise RecipeError(f'model.config: {architecture} refuses it: {error}') from error


def _own_name(config: Any, name: str) -> str:
    """Return what this architecture calls a field that most call ``name``: GPT-2 has ``n_positions``."""
    return config.attribute_map.get(name, name)


def _check_kind(name: str, value: Any, default: Any) -> None:
    """Check a value against the kind of the default; transformers takes anything, and fails later or not at all."""
    for kind, types, wanted in (
        (bool, bool, 'true or false'),
        (int, int, 'an integer'),
        (float, (int, float), 'a number'),
        (str, str, 'a text'),
    ):
        if isinstance(default, kind):
            if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
                raise RecipeError(f'model.config.{name}: must be {wanted}, got {value!r}')
            return


def _stored_config(root: str) -> Any:
    with extra('lm', 'a language model'):
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not Path(root).is_dir():
        raise RecipeError(f'model.root: {root!r} is no folder; it must be one of save_pretrained')
    if not Path(root, 'config.json').is_file():
        raise RecipeError(f'model.root: {root!r} holds no config.json; it must be a folder of save_pretrained')
    try:
        config = AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises what its parts raise: OSError, KeyError, ValueError, ...
        raise RecipeError(f'model.root: the configuration in {root!r} cannot be read: {error}') from error
    held = config.architectures or [config.model_type]
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    if not known & set(held):
        raise RecipeError(f'model.root: {root!r} holds {", ".join(held)}, which is no causal language model')
    return config


def _new(section: CausalLM, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation=section.attention)
    except Exception as error:
        raise RecipeError(f'model.config: {config.model_type} refuses it: {error}') from error


def _loaded(section: CausalLM, root: str, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        # In fp32, whatever it was saved in: the optimizer adds small steps to the weights.
        network, loading = AutoModelForCausalLM.from_pretrained(
            root,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            torch_dtype=torch.float32,
            attn_implementation=section.attention,
            output_loading_info=True,
        )
    except Exception as error:
        raise RecipeError(f'model.root: the weights in {root!r} cannot be read: {error}') from error
    missing = sorted(loading['missing_keys'])
    if missing:
        raise RecipeError(
            f'model.root: {root!r} lacks {len(missing)} weights of its architecture {config.model_type}, '
            f'such as {missing[0]}; they are of another architecture'
        )
    return network


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Return the transformer's blocks: the items of its outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)

"""The models of docs/scale.md are those it names."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

from benchmarks.scale import LAYOUTS, MODELS, Decoder

transformers = pytest.importorskip('transformers')


def network(model: Decoder) -> Any:
    """LLaMA, without memory for its weights."""
    config = transformers.LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.width,
        intermediate_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.width // 64,
        num_key_value_heads=model.keys // 64,
    )
    importlib.import_module('torch._dynamo')  # torch cannot import it on the meta device
    with torch.device('meta'):
        return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize('name', MODELS)
def test_sizes_are_those_of_the_network(name: str) -> None:
    model = MODELS[name]
    found = network(model)
    parameters = list(found.parameters())
    assert model.size.parameters == sum(p.numel() for p in parameters) == sum(model.units)
    assert model.size.tensors == len(parameters)
    assert model.block == sum(p.numel() for p in found.model.layers[0].parameters())


@pytest.mark.parametrize('name', MODELS)
def test_padding_is_what_the_page_says(name: str) -> None:
    """FSDP2 cuts the first dimension, and fills it up to a multiple of the ranks."""
    parameters = list(network(MODELS[name]).parameters())
    whole = sum(p.numel() for p in parameters)
    for _, shards in LAYOUTS.values():
        padded = sum(math.ceil(len(p) / shards) * shards * p[0].numel() for p in parameters)
        assert 1 <= padded / whole < 1.03

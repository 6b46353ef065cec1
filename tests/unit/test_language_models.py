"""Language models by recipe: new ones and those of a folder, and the one line that each mistake gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from composer_sam.recipes import RecipeError, load_recipe
from composer_sam.recipes.data import build_data
from composer_sam.recipes.networks import build_network
from composer_sam.recipes.schema import CausalLM
from tests.language import LM, folder_of, text, words

transformers = pytest.importorskip('transformers')


def network(**config: Any) -> CausalLM:
    small = {'architecture': 'gpt2', 'n_embd': 8, 'n_layer': 1, 'n_head': 2, **config}
    return CausalLM(name='causal_lm', config=small)


def saved_model(path: Path, kind: str = 'GPT2LMHeadModel', **config: Any) -> str:
    small = {'n_embd': 8, 'n_layer': 1, 'n_head': 2, 'vocab_size': 257, 'n_positions': 8, **config}
    getattr(transformers, kind)(transformers.GPT2Config(**small)).save_pretrained(path)
    return str(path)


def test_a_model_predicts_the_next_token() -> None:
    """The loss of the model is the cross-entropy of each token after the first, by hand."""
    torch.manual_seed(0)
    data = build_data(text(), seed=0)
    model = build_network(network(), data).eval()
    batch = next(iter(data.test))
    outputs = model(batch)
    scores, wanted = outputs['logits'][:, :-1].flatten(0, 1), batch['input_ids'][:, 1:].flatten()
    torch.testing.assert_close(model.loss(outputs, batch), torch.nn.functional.cross_entropy(scores, wanted))


def test_vocabulary_and_positions_come_from_the_text(tmp_path: Path) -> None:
    for architecture, positions in (('gpt2', 'n_positions'), ('llama', 'max_position_embeddings')):
        small = {'hidden_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 2}
        section = CausalLM(name='causal_lm', config={'architecture': architecture, **small})
        data = build_data(text(root=folder_of(tmp_path, a='one two ' * 40), tokenizer=words(tmp_path / 'words')), 0)
        config: Any = build_network(section, data).config
        assert (config.model_type, config.vocab_size, getattr(config, positions)) == (architecture, 5, 8)
        assert (config.hidden_size, config.bos_token_id, config.eos_token_id) == (8, 4, 4)


def test_a_larger_vocabulary_and_more_positions_are_taken() -> None:
    model: Any = build_network(network(vocab_size=320, n_positions=99), build_data(text(), seed=0))
    assert model.model.transformer.wte.weight.shape == (320, 8)
    assert model.model.transformer.wpe.weight.shape == (99, 8)


def test_the_weights_of_a_folder_are_loaded_in_fp32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    root = saved_model(tmp_path)
    stored = transformers.AutoModelForCausalLM.from_pretrained(root)
    stored.to(torch.bfloat16).save_pretrained(root)
    model: Any = build_network(CausalLM(name='causal_lm', root=root), build_data(text(), seed=0))
    for ours, theirs in zip(model.model.parameters(), stored.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())


def test_blocks_are_marked_for_fsdp_and_nothing_else() -> None:
    model = build_network(network(n_layer=3), build_data(text(), seed=0))
    marked = [type(module).__name__ for module in model.modules() if getattr(module, '_fsdp_wrap', False)]
    assert marked == ['GPT2Block'] * 3


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (['model.config.vocab_size=100'], r'^model\.config: vocab_size 100 is less than the 257 tokens of data\.token'),
        (['data.sequence_length=4096', 'model.config.n_positions=8'], r'^data\.sequence_length: 4096 .* 8 positions'),
        (['model.config.n_ebmd=8'], r'^model\.config\.n_ebmd: unknown key \(value 8\); did you mean .*n_embd'),
        (['model.config.n_layer=two'], r"^model\.config\.n_layer: must be an integer, got 'two'$"),
        (['model.config.embd_pdrop=true'], r'^model\.config\.embd_pdrop: must be a number, got True$'),
        (['model.config.architecture=gtp2'], r"^model\.config\.architecture: unknown .*'gtp2'\); did you mean .*gpt2"),
        (['model.config.architecture=t5'], r"^model\.config\.architecture: unknown architecture \(value 't5'\)"),
        (['model.config.architecture=null'], r'^model\.config\.architecture: is required'),
        (['model.config=null'], r'^model\.config: is required, such as '),
        (['model.root=nowhere'], r"^model\.root: 'nowhere' has a configuration of its own, and model\.config is given"),
        (['model.config=null', 'model.root=nowhere'], r"^model\.root: 'nowhere' is no folder"),
        (['model.attention=fast'], r"^model\.attention: got 'fast', should be 'sdpa', 'eager' or 'flash_attention_2'$"),
        (['model.name=mlp'], r"^model\.name: 'mlp' takes no text, and data\.name is 'text'; choose 'causal_lm'$"),
        (['data.name=digits'], r"^model\.name: 'causal_lm' takes text, and data\.name is 'digits'; choose 'text'$"),
        (['data.label_noise=0.1'], r'^data\.label_noise: got 0\.1, should be 0: the label of a token is the token'),
        (['data.source=perl'], r"^data\.source: got 'perl', should be 'python' or 'pydoc'$"),
        (['data.pattern=[]'], r'^data\.pattern: got \[\], should be List should have at least 1 item'),
        (['data.sequence_length=1'], r'^data\.sequence_length: got 1, should be greater than or equal to 2$'),
    ],
)
def test_a_mistake_in_the_recipe_is_one_line_before_any_data_is_read(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(LM / 'adamw.yaml', overrides=overrides)
    assert '\n' not in str(caught.value)


def test_a_configuration_that_its_architecture_refuses_is_one_line() -> None:
    with pytest.raises(RecipeError, match=r'^model\.config: gpt2 refuses it: .*divisible'):
        build_network(network(n_embd=10, n_head=3), build_data(text(), seed=0))


def test_a_folder_that_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    classifier = saved_model(tmp_path / 'classifier', 'GPT2ForSequenceClassification')
    small = saved_model(tmp_path / 'small', vocab_size=100)
    short = saved_model(tmp_path / 'short', n_positions=4)
    other, broken = tmp_path / 'other', tmp_path / 'broken'
    saved_model(other)
    config = json.loads((other / 'config.json').read_text())
    (other / 'config.json').write_text(json.dumps({**config, 'architectures': None, 'model_type': 't5'}))
    broken.mkdir()
    (broken / 'config.json').write_text('{"model_type": "unheard"}')
    for root, message in (
        (str(tmp_path), r"^model\.root: '.*' holds no config\.json; it must be a folder of save_pretrained$"),
        (classifier, r"^model\.root: '.*' holds GPT2ForSequenceClassification, which is no causal language model$"),
        (str(other), r"^model\.root: '.*' holds t5, which is no causal language model$"),
        (str(broken), r"^model\.root: the configuration in '.*' cannot be read: "),
        (small, r'^model\.root: vocab_size 100 is less than the 257 tokens of data\.tokenizer; the network must know'),
        (short, r'^data\.sequence_length: 8 is more than the 4 positions of the model \(n_positions\)$'),
    ):
        overrides = ['data.sequence_length=8', 'model.config=null', f'model.root={root}']
        with pytest.raises(RecipeError, match=message) as caught:
            load_recipe(LM / 'adamw.yaml', overrides=overrides)
        assert '\n' not in str(caught.value)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    saved_model(tmp_path / 'gpt2')
    llama = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=257
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(tmp_path / 'llama')
    (tmp_path / 'gpt2' / 'model.safetensors').replace(tmp_path / 'llama' / 'model.safetensors')
    data = build_data(text(), seed=0)
    with pytest.raises(RecipeError, match=r'^model\.root: .* lacks \d+ weights of its architecture llama, such as '):
        build_network(CausalLM(name='causal_lm', root=str(tmp_path / 'llama')), data)
    (tmp_path / 'llama' / 'model.safetensors').unlink()
    with pytest.raises(RecipeError, match=r'^model\.root: the weights in .* cannot be read: '):
        build_network(CausalLM(name='causal_lm', root=str(tmp_path / 'llama')), data)

"""The tokenizers that a recipe can name: the bytes of the text, or a Hugging Face tokenizer in a local folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from composer_sam.extras import extra
from composer_sam.recipes.errors import RecipeError

__all__ = ['BYTES', 'Bytes', 'Pretrained', 'Tokenizer', 'find_tokenizer']

BYTES = 'bytes'


class Tokenizer(Protocol):
    """What makes tokens of a text.

    Attributes:
        size: the number of tokens: all are smaller.
        separator: the token that ends a document.
        pretrained: the tokenizer of transformers that does the same; it is saved in checkpoints.
    """

    @property
    def size(self) -> int: ...

    @property
    def separator(self) -> int: ...

    @property
    def pretrained(self) -> Any: ...

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, without a separator."""
        ...


class Bytes:
    """The bytes of a text in UTF-8 as its tokens, and a separator."""

    size = 257
    separator = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode('utf-8', 'replace'), dtype=np.uint8).astype(np.int32)

    @property
    def pretrained(self) -> Any:
        with extra('lm', 'a language model'):
            from tokenizers import Tokenizer as Rules
            from tokenizers import decoders, models, pre_tokenizers
            from transformers import PreTrainedTokenizerFast

        vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
        rules: Any = Rules(models.BPE(vocab=vocabulary, merges=[]))
        rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        rules.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=rules, eos_token='<|endoftext|>')


@dataclass(frozen=True)
class Pretrained:
    """A tokenizer of transformers."""

    pretrained: Any
    size: int
    separator: int

    def encode(self, text: str) -> np.ndarray:
        # Not verbose: it would warn of texts that are longer than a sequence.
        return np.asarray(self.pretrained.encode(text, add_special_tokens=False, verbose=False), dtype=np.int32)


def find_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of the key ``data.tokenizer``.

    Raises:
        RecipeError: there is no such folder, or it holds no tokenizer with a token for the end of a text.
    """
    if name == BYTES:
        return Bytes()
    if not Path(name).is_dir():
        raise RecipeError(f"data.tokenizer: {name!r} is no folder; write 'bytes', or the folder of a tokenizer")
    with extra('lm', 'a tokenizer of your own'):
        from transformers import AutoTokenizer
    try:
        found = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises what its parts raise: OSError, KeyError, ValueError, ...
        raise RecipeError(f'data.tokenizer: {name!r} holds no tokenizer that can be read: {error}') from error
    separator = next((one for one in (found.eos_token_id, found.sep_token_id) if one is not None), None)
    if separator is None:
        raise RecipeError(
            f'data.tokenizer: that in {name!r} has no token for the end of a text, which separates documents; set its '
            'eos_token and save it again'
        )
    return Pretrained(found, max(found.get_vocab().values()) + 1, separator)


def _letters() -> list[str]:
    """Return the letter by which byte-level tokenizers write each byte: the byte's own where it can be printed."""
    printed = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]

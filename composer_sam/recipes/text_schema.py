"""The keys of text and of causal language models with their types and ranges."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator
from pydantic_core import PydanticCustomError

from composer_sam.recipes.sections import DataSection, ModelSection

__all__ = ['CausalLM', 'Text']

Source = Literal['python', 'pydoc']


class Text(DataSection):
    """Text as sequences of tokens, of equal length and without padding.

    The documents are joined, with a separator after each, and cut into sequences. A hash of its name decides whether a
    document is for training or for testing, so the split is the same in every run.

    Attributes:
        source: text that comes with Python: ``python``, the source files of the standard library, a document per file;
            ``pydoc``, the topics of the language reference that ``help()`` shows.
        root: text of your own in place of ``source``: a text file (one document), a folder of text files, a file of
            JSON lines, a folder of ``datasets.Dataset.save_to_disk``, or a folder of MDS shards.
        pattern: the files of a folder that are read, also in its subfolders.
        key: the key (the column) of the text in JSON lines, data sets and MDS shards.
        test_root: the text for testing, of the same kinds; without it a part of the documents is.
        test_fraction: the fraction of the documents that is held out for testing. Where there is one document only,
            the end of it is. Means nothing with ``test_root``.
        max_bytes: the largest number of bytes of text, in UTF-8, that is read of ``source`` or ``root``, and of
            ``test_root``. Files are read in the order of the hashes of their names, so that less text is a random part
            of the whole; documents of other kinds in their own order.
        tokenizer: ``bytes`` (256 bytes and the separator), or the folder of a Hugging Face tokenizer, whose token for
            the end of a text is the separator.
        sequence_length: the number of tokens of a sequence.
    """

    samples: ClassVar[str] = 'sequences'

    name: Literal['text']
    source: Source = 'python'
    root: str | None = None
    pattern: list[str] = Field(default=['*.txt', '*.md', '*.py'], min_length=1)
    key: str = 'text'
    test_root: str | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    max_bytes: PositiveInt | None = None
    tokenizer: str = 'bytes'
    sequence_length: Annotated[int, Field(ge=2)] = 128

    @field_validator('label_noise')
    @classmethod
    def _no_labels(cls, label_noise: float) -> float:
        if label_noise:
            raise PydanticCustomError('label_noise', '0: the label of a token is the token after it')
        return label_noise


class CausalLM(ModelSection):
    """A causal language model of Hugging Face's transformers, by its configuration or from a folder.

    Attributes:
        config: the configuration of a network with new weights: ``architecture``, the name of the model type, such as
            ``gpt2`` or ``llama``, and the fields of its class. The size of the vocabulary and the number of positions
            come from the data where they are not given.
        root: in place of ``config``, the local folder of ``save_pretrained``; its weights are loaded.
        attention: the implementation of attention. Methods that differentiate twice need ``eager``.
        gradient_checkpointing: whether to recompute the activations of every block in the backward, which takes less
            memory and about a third more time.
    """

    name: Literal['causal_lm']
    config: dict[str, Any] | None = None
    root: str | None = None
    attention: Literal['sdpa', 'eager', 'flash_attention_2'] = 'sdpa'
    gradient_checkpointing: bool = False

"""From documents to sequences of tokens: the split, and packing without padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from composer_sam.recipes.documents import Document, read_documents
from composer_sam.recipes.errors import RecipeError
from composer_sam.recipes.samples import divided
from composer_sam.recipes.text_schema import Text
from composer_sam.recipes.tokenizers import Tokenizer

__all__ = ['Sequences', 'pack', 'read_text', 'split']

Batch = dict[str, Tensor]


class Sequences(Dataset):
    """Sequences of tokens, in batches that a model of transformers takes.

    Args:
        tokens: a sequence per row.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a sequence and its labels; a model compares each of its outputs with the label one place further."""
        batch = self.__getitems__([index])
        return batch['input_ids'][0], batch['labels'][0]

    def __getitems__(self, indices: list[int]) -> Batch:
        tokens = self.tokens[indices].long()
        # A tensor of their own: HuggingFaceModel moves the labels by one place where they are.
        return {'input_ids': tokens, 'labels': tokens.clone()}

    def held_out(self, fraction: float, seed: int) -> tuple[Sequences, Sequences]:
        """Split off a random ``fraction`` of the sequences: return the others, and the fraction."""
        rest, few = divided(len(self), fraction, seed)
        return Sequences(self.tokens[rest]), Sequences(self.tokens[few])


def read_text(section: Text, tokenizer: Tokenizer) -> tuple[Sequences, Sequences]:
    """Read the text of a recipe and return the sequences for training and for testing.

    Raises:
        RecipeError: the text cannot be read, or is shorter than a sequence.
    """
    key = 'data.source' if section.root is None else 'data.root'
    documents = read_documents(section, key, section.root)
    if section.test_root is None:
        train, test = split(documents, section.test_fraction)
    else:
        train, test = documents, read_documents(section, 'data.test_root', section.test_root)
    return (
        Sequences(pack(train, tokenizer, section.sequence_length, 'training')),
        Sequences(pack(test, tokenizer, section.sequence_length, 'test')),
    )


def split(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Return the documents for training and for testing: about a ``fraction`` of them, and at least one.

    What a document is for depends on its name and not on the seed. Of one document the end is for testing.

    Raises:
        RecipeError: none is left for training.
    """
    if len(documents) == 1:
        (whole,) = documents
        middle = round((1 - fraction) * len(whole.text))
        return [Document(whole.name, whole.text[:middle])], [Document(whole.name, whole.text[middle:])]
    places = [document.place for document in documents]
    last = max(fraction, min(places) + 1e-15)
    train = [document for document, place in zip(documents, places, strict=True) if place >= last]
    test = [document for document, place in zip(documents, places, strict=True) if place < last]
    if not train:
        raise RecipeError(
            f'data.test_fraction: {fraction} of the {len(documents)} documents leaves none for training; choose a '
            'smaller one, or give a data.test_root'
        )
    return train, test


def pack(documents: Sequence[Document], tokenizer: Tokenizer, length: int, what: str = 'training') -> Tensor:
    """Return the sequences of the documents: joined, with a separator after each, and cut; the rest is left out.

    Args:
        documents: the documents.
        tokenizer: what makes tokens of them.
        length: the number of tokens of a sequence.
        what: what the text is for, for the message.

    Raises:
        RecipeError: there are fewer tokens than a sequence has.
    """
    separator = np.asarray([tokenizer.separator], dtype=np.int32)
    parts = [part for document in documents for part in (tokenizer.encode(document.text), separator)]
    tokens = np.concatenate(parts)
    count = len(tokens) // length
    if not count:
        raise RecipeError(f'data.sequence_length: {length} is more than the {len(tokens)} tokens of the {what} text')
    return torch.from_numpy(tokens[: count * length].reshape(count, length))

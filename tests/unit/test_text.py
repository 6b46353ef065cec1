"""Text: its sources, the split, packing, tokenizers, and the one line that each mistake gets."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from composer_sam.recipes import RecipeError
from composer_sam.recipes.data import build_data
from composer_sam.recipes.documents import Document, read_documents
from composer_sam.recipes.text import Sequences, pack, split
from composer_sam.recipes.tokenizers import Bytes, find_tokenizer
from tests.language import folder_of, text, words

pytest.importorskip('transformers')


def documents_of(**keys: Any) -> list[Document]:
    section = text(**keys)
    return read_documents(section, 'data.root', section.root)


def tokens_of(loader: DataLoader) -> torch.Tensor:
    sequences: Any = loader.dataset
    return sequences.tokens


def many(path: Path, count: int = 40, length: int = 30) -> str:
    """Documents of one letter each, so that every token says where it comes from."""
    return folder_of(path, **{f'file{index}': chr(200 + index) * length for index in range(count)})


# Packing.


def test_documents_are_joined_with_a_separator_after_each_and_cut() -> None:
    documents = [Document('a', 'abc'), Document('b', 'de'), Document('c', 'fghij')]
    sequences = pack(documents, Bytes(), 4)
    a = ord('a')
    assert sequences.tolist() == [[a, a + 1, a + 2, 256], [a + 3, a + 4, 256, a + 5], [a + 6, a + 7, a + 8, a + 9]]


def test_labels_are_the_tokens_in_memory_of_their_own() -> None:
    batch = Sequences(torch.arange(12, dtype=torch.int32).view(3, 4)).__getitems__([2, 0])
    assert batch['input_ids'].tolist() == batch['labels'].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert batch['input_ids'].dtype == torch.int64
    batch['labels'][:, :-1] = batch['labels'][:, 1:].clone()  # as HuggingFaceModel does before it evaluates
    assert batch['input_ids'].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]


# The split.


def test_the_split_goes_by_the_name_and_not_by_the_others() -> None:
    documents = [Document(f'name{index}', 'text') for index in range(400)]
    train, test = split(documents, 0.1)
    assert 20 <= len(test) <= 60
    assert {one.name for one in train} | {one.name for one in test} == {one.name for one in documents}
    assert not {one.name for one in train} & {one.name for one in test}
    again, fewer = split(documents[::2], 0.1)
    assert {one.name for one in fewer} <= {one.name for one in test}
    assert {one.name for one in again} <= {one.name for one in train}
    assert len(split(documents, 0.5)[1]) > 150


def test_one_document_at_least_is_for_testing() -> None:
    for count in range(2, 12):
        _, test = split([Document(f'file {index}', 'text') for index in range(count)], 0.001)
        assert len(test) == 1


def test_the_end_of_a_single_document_is_for_testing() -> None:
    train, test = split([Document('all', '0123456789')], 0.2)
    assert (train[0].text, test[0].text) == ('01234567', '89')


def test_no_training_document_is_refused() -> None:
    with pytest.raises(RecipeError, match=r'^data\.test_fraction: 0\.999 of the 2 documents leaves none for training'):
        split([Document('one', 'text'), Document('two', 'text')], 0.999)


def test_training_and_test_sequences_have_no_document_in_common(tmp_path: Path) -> None:
    data = build_data(text(root=many(tmp_path)), seed=0)
    train, test = (set(tokens_of(loader).flatten().tolist()) for loader in (data.train, data.test))
    shared = {0xC3, 256}  # the first byte of all letters, and the separator
    assert train and test and not (train & test) - shared


def test_a_test_root_is_the_test_text(tmp_path: Path) -> None:
    section = text(root=folder_of(tmp_path / 'a', x='a' * 64), test_root=folder_of(tmp_path / 'b', x='b' * 16))
    data = build_data(section, seed=0)
    assert (len(tokens_of(data.train)), len(tokens_of(data.test))) == (8, 2)
    assert set(tokens_of(data.test).flatten().tolist()) == {ord('b')}


def test_validation_sequences_come_from_the_training_text(tmp_path: Path) -> None:
    section = text(root=many(tmp_path), validation_fraction=0.25)
    whole = build_data(section.model_copy(update={'validation_fraction': 0.0}), seed=3)
    data = build_data(section, seed=3, keep_test=True)
    assert data.validation is not None
    rest, chosen = ([tuple(row) for row in tokens_of(one).tolist()] for one in (data.train, data.validation))
    assert sorted(rest + chosen) == sorted(tuple(row) for row in tokens_of(whole.train).tolist())
    assert len(chosen) == round(0.25 * len(tokens_of(whole.train)))
    assert torch.equal(tokens_of(build_data(section, seed=3).test), tokens_of(data.validation))
    assert not torch.equal(tokens_of(build_data(section, seed=4).test), tokens_of(data.validation))


# The sources.


@pytest.mark.parametrize('source', ['python', 'pydoc'])
def test_an_embedded_text_is_always_the_same(source: str) -> None:
    first, again = (documents_of(source=source, max_bytes=200_000) for _ in range(2))
    assert first == again
    assert 199_000 < sum(len(one.text.encode()) for one in first) <= 200_000
    more = documents_of(source=source, max_bytes=300_000)
    assert [one.name for one in more[: len(first)]] == [one.name for one in first]
    train, test = split(first, 0.1)
    assert len(train) > len(test) >= 1


def test_python_sources_are_those_of_the_standard_library() -> None:
    names = {one.name for one in documents_of(source='python', max_bytes=None)}
    assert {'textwrap.py', 'json/decoder.py'} <= names
    assert not [name for name in names if 'site-packages' in name or name.startswith(('test/', '_sysconfigdata'))]


def test_pydoc_is_the_language_reference() -> None:
    topics = {one.name: one.text for one in documents_of(source='pydoc', max_bytes=None)}
    assert 'lambda' in topics['lambda']


def test_max_bytes_is_the_size_of_the_text_in_bytes(tmp_path: Path) -> None:
    found = documents_of(root=folder_of(tmp_path, a='é' * 100, b='é' * 100), max_bytes=301)
    assert sum(len(one.text.encode()) for one in found) == 300  # half a letter is left out
    assert len(documents_of(root=str(tmp_path))) == 2


def test_a_folder_is_read_by_its_patterns_also_below(tmp_path: Path) -> None:
    folder_of(tmp_path / 'deep' / 'er', one='1')
    (tmp_path / 'two.md').write_text('2')
    (tmp_path / 'three.csv').write_text('3')
    (tmp_path / 'empty.txt').write_text(' \n')
    assert sorted(one.text for one in documents_of(root=str(tmp_path))) == ['1', '2']
    assert [one.text for one in documents_of(root=str(tmp_path), pattern=['*.csv'])] == ['3']


def test_json_lines_are_read_by_their_key(tmp_path: Path) -> None:
    path = tmp_path / 'lines.jsonl'
    path.write_text('{"text": "one", "title": "x"}\n\n{"text": "two", "title": "y"}\n')
    assert [one.text for one in documents_of(root=str(path))] == ['one', 'two']
    assert [one.text for one in documents_of(root=str(path), key='title')] == ['x', 'y']


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip('datasets')
    datasets.Dataset.from_dict({'text': ['one', 'two'], 'id': [1, 2]}).save_to_disk(str(tmp_path / 'set'))
    assert [one.text for one in documents_of(root=str(tmp_path / 'set'))] == ['one', 'two']
    with pytest.raises(RecipeError, match=r"^data\.key: record 1 of '.*set' has no 'body'; it has 'text', 'id'$"):
        documents_of(root=str(tmp_path / 'set'), key='body')
    datasets.DatasetDict({'train': datasets.Dataset.from_dict({'text': ['one']})}).save_to_disk(str(tmp_path / 'sets'))
    with pytest.raises(RecipeError, match=r'^data\.root: .* holds several data sets \(train\); name one of these'):
        documents_of(root=str(tmp_path / 'sets'))


def test_shards_are_read(tmp_path: Path) -> None:
    streaming = pytest.importorskip('streaming')
    with streaming.MDSWriter(out=str(tmp_path / 'mds'), columns={'text': 'str'}) as writer:
        for value in ('one', 'two'):
            writer.write({'text': value})
    assert [one.text for one in documents_of(root=str(tmp_path / 'mds'))] == ['one', 'two']


def test_shards_that_would_run_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / 'index.json').write_text('{"shards": [{"column_encodings": ["pkl"], "column_names": ["text"]}]}')
    with pytest.raises(
        RecipeError, match=r"^data\.root: '.*' has a column in the encoding 'pkl'; reading it would run"
    ):
        documents_of(root=str(tmp_path))


@pytest.mark.parametrize(('marker', 'package'), [('index.json', 'streaming'), ('state.json', 'datasets')])
def test_a_source_without_its_package_names_the_extra(
    tmp_path: Path, marker: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (marker, 'dataset_info.json'):
        (tmp_path / name).write_text('{}')
    found = builtins.__import__

    def missing(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split('.')[0] == package:
            raise ModuleNotFoundError(f'No module named {package!r}', name=package)
        return found(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(builtins, '__import__', missing)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}, .* pip install 'composer-sam\[lm-data\]'"):
        documents_of(root=str(tmp_path))


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{"text": "one"}\n{"body": "two"}', r"^data\.key: line 2 of '.*' has no 'text'; it has 'body'$"),
        ('{"text": 3}', r"^data\.key: 'text' in line 1 of '.*' must be a text, got int$"),
        ('["one"]', r"^data\.key: line 1 of '.*' must be a mapping with the key 'text', got list$"),
        ('{"text": ', r"^data\.root: line 1 of '.*' is no JSON: "),
        ('\n', r"^data\.root: '.*lines\.jsonl' holds no text$"),
    ],
)
def test_a_mistake_in_json_lines_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / 'lines.jsonl'
    path.write_text(content)
    with pytest.raises(RecipeError, match=message):
        documents_of(root=str(path))


def test_a_mistake_about_the_text_is_one_line(tmp_path: Path) -> None:
    empty, small = folder_of(tmp_path / 'empty', a='  '), folder_of(tmp_path / 'small', a='a' * 40)
    none = str(tmp_path / 'none')
    Path(none).mkdir()
    for keys, message in (
        ({'root': str(tmp_path / 'nowhere')}, r"^data\.root: '.*nowhere' does not exist$"),
        ({'root': none}, r"^data\.pattern: no file in '.*none' matches '\*\.txt' or '\*\.md' or '\*\.py'$"),
        ({'root': empty}, r"^data\.root: '.*empty' holds no text$"),
        ({'root': small, 'test_root': empty}, r"^data\.test_root: '.*empty' holds no text$"),
        ({'root': small}, r'^data\.sequence_length: 8 is more than the 5 tokens of the test text$'),
        (
            {'root': small, 'sequence_length': 64},
            r'^data\.sequence_length: 64 is more than the 37 tokens of the training',
        ),
        ({'root': small, 'test_root': small, 'batch_size': 6}, r'^data\.batch_size: 6 is more than the 5 training seq'),
        (
            {'root': small, 'test_root': small, 'validation_fraction': 0.01},
            r'^data\.validation_fraction: 0\.01 of 5 training sequences is none',
        ),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            build_data(text(**keys), seed=0)
        assert '\n' not in str(caught.value)


# Tokenizers.


def test_bytes_and_their_tokenizer_of_transformers_agree() -> None:
    ours = Bytes()
    pretrained = ours.pretrained
    written = 'def f(x):\n\treturn "é ÿ — 漢 🙂"  \r\n'
    assert ours.encode(written).tolist() == pretrained.encode(written) == list(written.encode())
    assert pretrained.decode(ours.encode(written)) == written
    assert (len(pretrained), pretrained.eos_token_id) == (ours.size, ours.separator)
    assert pretrained.decode(range(256), errors='ignore') is not None


def test_a_tokenizer_in_a_folder_is_used(tmp_path: Path) -> None:
    tokenizer = find_tokenizer(words(tmp_path))
    assert tokenizer.encode('two one nine two').tolist() == [2, 1, 0, 2]
    assert tokenizer.encode('one').dtype == np.int32
    assert (tokenizer.size, tokenizer.separator) == (5, 4)
    assert pack([Document('a', 'one two'), Document('b', 'three')], tokenizer, 5).tolist() == [[1, 2, 4, 3, 4]]


def test_the_size_of_a_tokenizer_is_its_largest_token(tmp_path: Path) -> None:
    assert find_tokenizer(words(tmp_path, first=100)).size == 105


def test_a_mistake_about_the_tokenizer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / 'none').mkdir()
    for name, message in (
        ('gpt2', r"^data\.tokenizer: 'gpt2' is no folder; write 'bytes', or"),
        (str(tmp_path / 'none'), r"^data\.tokenizer: '.*none' holds no tokenizer that can be read: "),
        (words(tmp_path / 'endless', eos=False), r'^data\.tokenizer: that in .* has no token for the end of a text'),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            find_tokenizer(name)
        assert '\n' not in str(caught.value)

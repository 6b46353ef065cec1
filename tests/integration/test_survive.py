"""Networks trained, damaged and fine-tuned by one command, which goes on where it was interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from composer_sam.commands.main import main
from composer_sam.diagnostics import noisy, quantized
from composer_sam.recipes import load_recipe
from composer_sam.recipes.data import build_data
from tests.language import LM, TINY

transformers = pytest.importorskip('transformers')
ADAMW, SAM = (str(LM / f'{name}.yaml') for name in ('adamw', 'sam'))
QUICK = [*TINY, 'max_duration=12ba', 'optimizer.weight_decay=0']
TRIALS = ['--noise', '0.2', '--draws', '2', '--bits', '4', '--samples', '16', '--jobs', '2']
TUNING = f"""
base: {LM / 'finetune.yaml'}
max_duration: 6ba
scheduler: {{t_warmup: 1ba}}
device_train_microbatch_size: 8
data: {{max_bytes: 20000, sequence_length: 32, batch_size: 8, eval_batch_size: 16}}
grid: {{optimizer.lr: [1.0e-3, 1.0e-2]}}
"""


def survive(out: Path, *arguments: str, tuning: str = TUNING) -> int:
    recipe = out.parent / 'tuning.yaml'
    recipe.write_text(tuning)
    return main(['survive', ADAMW, SAM, *QUICK, *TRIALS, '--finetune', str(recipe), '--out', str(out), *arguments])


def results(out: Path) -> dict[str, Any]:
    """The results by the first word of the recipe's name; the changes on the command line follow."""
    return {one['label'].split(',')[0]: one for one in json.loads((out / 'results.json').read_text())}


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('survival') / 'out'
    assert survive(out) == 0
    return out


def sequences(source: str) -> Tensor:
    """The first 16 test sequences in the command's order."""
    import numpy as np

    recipe = load_recipe(ADAMW, (), [*QUICK, f'data.source={source}'])
    tokens = build_data(recipe.data, recipe.seed).test.dataset.tokens.long()  # pyright: ignore
    return tokens[sorted(np.random.default_rng(0).permutation(len(tokens))[:16])]


def loss(network: Any, tokens: Tensor) -> float:
    """By hand: the mean over all tokens after the first of every sequence."""
    with torch.no_grad():
        scores = network.eval()(input_ids=tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten()).item()


def saved(out: Path, name: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(out / 'networks' / name)


@pytest.mark.parametrize('name', ['AdamW', 'SAM'])
def test_losses_are_those_of_the_saved_network(finished: Path, name: str) -> None:
    found = results(finished)[name]
    own, other = sequences('python'), sequences('pydoc')
    measured = found['measured']
    network = saved(finished, measured['name'])
    assert measured['loss'] == pytest.approx(loss(network, own), rel=1e-5)
    assert all(tuned['before'] == pytest.approx(loss(network, other), rel=1e-5) for tuned in found['finetuned'])
    for damaged, result in [
        (quantized(network, 4), measured['quantized']['4']),
        *((noisy(network, 0.2, seed), measured['noisy']['0.2'][seed]) for seed in range(2)),
    ]:
        network = saved(finished, measured['name'])
        network.load_state_dict(damaged, strict=False)
        assert result == pytest.approx(loss(network, own), rel=1e-5)
        assert result != measured['loss']


def test_fine_tuning_begins_with_the_network_and_ends_elsewhere(finished: Path) -> None:
    for found in results(finished).values():
        slow, fast = found['finetuned']
        assert [tuned['values'] for tuned in (slow, fast)] == [{'optimizer.lr': 1e-3}, {'optimizer.lr': 1e-2}]
        assert slow['steps'] == fast['steps'] == 6
        assert fast['after'] < slow['after'] < slow['before'] == fast['before']
        assert fast['first'] != slow['first'] != found['measured']['loss']


def test_the_methods_train_what_compare_trains(finished: Path, tmp_path: Path) -> None:
    assert main(['compare', ADAMW, SAM, *QUICK, '--out', str(tmp_path), '--jobs', '2']) == 0
    runs = {run['recipe'].split(',')[0]: run for run in json.loads((tmp_path / 'results.json').read_text())['runs']}
    for name, found in results(finished).items():
        assert found['trained']['test_loss'] == runs[name]['loss']
    assert runs['AdamW']['loss'] != runs['SAM']['loss']


def test_tables_and_picture_are_written(finished: Path) -> None:
    tables = (finished / 'tables.md').read_text()
    assert tables.startswith('2 networks, of seed 17; losses in nats per token on 16 test sequences')
    assert [line for line in tables.splitlines() if line.startswith('## ')] == [
        '## Loss on the first text, and how much quantised and noisy weights lose',
        '## Fine-tuned on the other text, lr 0.001',
        '## Fine-tuned on the other text, lr 0.01',
        *[line for line in tables.splitlines() if line.startswith('## At equal learning')],
    ]
    assert (finished / 'survival.png').read_bytes().startswith(b'\x89PNG')
    assert not list((finished / 'checkpoints').iterdir())


def outcome(out: Path) -> str:
    """All results without their times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(item) for key, item in value.items() if key != 'seconds'}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    return json.dumps(timeless(json.loads((out / 'results.json').read_text())))


def test_only_what_is_missing_is_done_again(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network that is lost is trained anew, with the same result; what was measured of it stays."""
    out = tmp_path / 'out'
    shutil.copytree(finished, out)
    names = {name: one['trained']['name'] for name, one in results(out).items()}
    (out / 'finetuned' / f'{names["AdamW"]}_lr=0.01.json').unlink()
    (out / 'measured' / f'{names["SAM"]}.json').unlink()
    shutil.rmtree(out / 'networks' / names['SAM'])
    capsys.readouterr()
    assert survive(out) == 0
    said = capsys.readouterr().err
    for line in ('1 of 2 runs are done', '1 of 2 runs are measured', '3 of 4 runs are fine-tuned'):
        assert line in said
    assert said.count('1 of 1 runs are') == 3
    assert outcome(out) == outcome(finished).replace(str(finished), str(out))


def test_other_trials_are_not_mixed_with_these(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob('*.*')}
    assert survive(finished, '--noise', '0.3') == 2
    said = capsys.readouterr().err
    assert 'is of a run with trials.noise=[0.2], and [0.3] is asked for' in said
    assert {path: path.stat().st_mtime_ns for path in finished.rglob('*.*')} == before


@pytest.mark.parametrize(
    ('arguments', 'tuning', 'message'),
    [
        (['--bits', '1'], TUNING, '--bits must be an integer in [2, 16], got 1'),
        (['--bits', '17'], TUNING, '--bits must be an integer in [2, 16], got 17'),
        (['--noise', '0'], TUNING, '--noise must be a finite number > 0, got 0.0'),
        (['parallelism.fsdp2={}'], TUNING, 'divides the network among processes'),
        ([], f'{TUNING}\nparallelism: {{fsdp2: {{}}}}', 'parallelism: --finetune divides'),
        ([], TUNING.replace('sequence_length: 32', 'sequence_length: 64'), 'data.sequence_length 64 is more than the'),
        (
            [],
            TUNING.replace('optimizer.lr: [1.0e-3, 1.0e-2]', 'data.sequence_length: [32, 64]'),
            'data.sequence_length 64 is more than the',
        ),
        ([], TUNING.replace('data: {', 'data: {tokenizer: words, '), 'data.tokenizer'),
        ([], f'base: {LM.parent / "digits" / "sgd.yaml"}', "--finetune trains 'mlp'; survive takes language models"),
        (['--finetune', 'no.yaml'], TUNING, "recipe 'no.yaml' does not exist"),
    ],
)
def test_mistakes_are_one_line_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], tuning: str, message: str
) -> None:
    assert survive(tmp_path / 'out', *arguments, tuning=tuning) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ''
    assert said.err.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_networks_of_other_kinds_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['survive', str(LM.parent / 'digits' / 'sgd.yaml'), '--out', str(tmp_path / 'out')]) == 2
    assert "SGD trains 'mlp'; survive takes language models" in capsys.readouterr().err


def test_numbers_that_are_none_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['survive', ADAMW, '--noise', 'much']) == 2
    assert "--noise: must be numbers separated by commas, got 'much'" in capsys.readouterr().err


def test_without_fine_tuning_networks_are_damaged_only(tmp_path: Path) -> None:
    assert main(['survive', ADAMW, *QUICK, *TRIALS, 'max_duration=2ba', '--out', str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / 'results.json').read_text())
    assert found['finetuned'] == []
    assert found['measured']['quantized'].keys() == {'4'}
    assert 'Fine-tuned' not in (tmp_path / 'tables.md').read_text()


def test_the_launcher_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert main(['survive', ADAMW]) == 2
    assert 'survive starts its own processes; run it without the launcher' in capsys.readouterr().err

"""Language models by recipe, through the real Trainer on the sources of Python's standard library."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback, Trainer
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.models import HuggingFaceModel
from torch import Tensor

from composer_sam import SAM, registry
from composer_sam.commands.main import main
from composer_sam.recipes import History, build_trainer, is_finished, load_recipe
from tests.language import LM, TINY, build, data_and_model, weights
from tests.problems import needs_graph

pytest.importorskip('transformers')
ROOT = LM.parents[1]
OVERLAYS = {path.stem.replace('_', ''): path for path in (ROOT / 'yamls' / 'methods').glob('*.yaml')}
DROPOUT = [f'model.config.{name}_pdrop=0.1' for name in ('embd', 'resid', 'attn')]
# The last evaluation batch is smaller than the others, of which Composer warns.
pytestmark = pytest.mark.filterwarnings('ignore:The ``compute`` method of metric:UserWarning')


def fit(name: str, *overrides: str, callbacks: tuple[Callback, ...] = ()) -> dict[str, Tensor]:
    trainer = build(name, *overrides, callbacks=callbacks)
    trainer.fit()
    trainer.close()
    return weights(trainer)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Logged(LoggerDestination):
    """All metrics that are logged, by name."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        del step
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(float(value))


class Passes(Callback):
    """How far the weights are from those of the step's beginning in every pass, and which of them."""

    def __init__(self) -> None:
        self.lengths: list[list[float]] = []
        self.moved: set[str] = set()
        self.sequences: list[list[int]] = []
        self._weights: dict[str, Tensor] = {}

    def batch_start(self, state: State, logger: Logger) -> None:
        del logger
        self.lengths.append([])
        self.sequences.append([])
        self._weights = {name: value.detach().clone() for name, value in state.model.named_parameters()}

    def before_forward(self, state: State, logger: Logger) -> None:
        del logger
        offsets = {name: (p - self._weights[name]).detach().double() for name, p in state.model.named_parameters()}
        self.lengths[-1].append(math.sqrt(sum(float(offset.square().sum()) for offset in offsets.values())))
        self.sequences[-1].append(len(state.batch['input_ids']))
        self.moved |= {name for name, offset in offsets.items() if offset.any()}


@pytest.mark.parametrize('name', ['adamw', 'sam', 'sam_last'])
def test_the_recipe_trains_and_the_loss_falls(name: str) -> None:
    history, passes = History(), Passes()
    trainer = build(name, 'max_duration=45ba', 'eval_interval=15ba', callbacks=(history, passes))
    trainer.fit()
    trainer.close()
    assert len(history.test['loss']) == 3
    assert history.train['loss'][0] > history.train['loss'][-1]
    assert math.log(257) > history.test['loss'][0] > history.test['loss'][-1]
    expected = {'adamw': [1] * 45, 'sam': [2] * 45, 'sam_last': [1] * 41 + [2] * 4}[name]
    assert list(map(len, passes.lengths)) == expected
    perturbed = [length for step in passes.lengths for length in step[1:]]
    assert perturbed == pytest.approx([0.05] * (sum(expected) - 45), rel=1e-4)
    assert trainer.state.timestamp.token.value == 45 * 8 * 32


def test_perplexity_is_reported() -> None:
    history, logged = History(), Logged()
    trainer = build('adamw', 'max_duration=5ba', 'eval_interval=5ba', callbacks=(history,))
    trainer.logger.destinations = (*trainer.logger.destinations, logged)
    trainer.fit()
    trainer.close()
    metrics = trainer.state.eval_metrics['eval']
    assert set(metrics) == {'LanguageCrossEntropy', 'LanguagePerplexity', 'MaskedAccuracy'}
    assert history.loss == pytest.approx(float(metrics['LanguageCrossEntropy'].compute()))
    assert history.perplexity == pytest.approx(float(metrics['LanguagePerplexity'].compute()))
    assert history.perplexity == pytest.approx(math.exp(history.loss))
    assert f'perplexity {history.perplexity:.4g}' in str(history)
    assert logged.values['metrics/eval/LanguagePerplexity'][-1] == pytest.approx(history.perplexity)


def test_the_test_loss_is_the_mean_over_all_test_tokens() -> None:
    """Evaluated by hand, in batches of another size."""
    history = History()
    trainer = build('adamw', 'max_duration=4ba', callbacks=(history,))
    trainer.fit()
    trainer.eval()
    data, _ = data_and_model()
    model: Any = trainer.state.model
    tokens = data.test.dataset.tokens.long()  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        scores = model.model.eval()(input_ids=tokens).logits[:, :-1]
    wanted = tokens[:, 1:]
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten()).item()
    assert history.loss == pytest.approx(loss, rel=1e-5)
    assert history.accuracy == pytest.approx((scores.argmax(-1) == wanted).float().mean().item(), rel=1e-5)
    trainer.close()


def test_the_seed_decides_the_run() -> None:
    torch.manual_seed(1)
    first = fit('sam', *DROPOUT, 'max_duration=4ba')
    torch.manual_seed(2)
    assert same(first, fit('sam', *DROPOUT, 'max_duration=4ba'))
    assert not same(first, fit('sam', *DROPOUT, 'max_duration=4ba', 'seed=18'))


def test_micro_batches_change_nothing_but_rounding() -> None:
    whole = fit('sam', 'max_duration=3ba', 'optimizer={name: sgd, betas: null, lr: 0.1}')
    parts = fit(
        'sam', 'max_duration=3ba', 'optimizer={name: sgd, betas: null, lr: 0.1}', 'device_train_microbatch_size=3'
    )
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', ['adamw', 'sam', 'sam_last'])
def test_autoresume_goes_on_as_if_never_interrupted(tmp_path: Path, name: str) -> None:
    schedule = [*DROPOUT, 'scheduler.t_max=20ba', 'max_duration=20ba']
    if name == 'sam_last':
        schedule.append('algorithms.sam.start=9ba')
    expected = fit(name, *schedule)
    checkpointed = [*schedule, f'save_folder={tmp_path}', 'autoresume=true', 'save_interval=1ba', 'run_name=run']
    fit(name, *checkpointed, 'max_duration=12ba')
    trainer = build(name, *checkpointed)
    assert trainer.state.timestamp.batch.value == 12
    assert not is_finished(trainer.state)
    trainer.fit()
    trainer.close()
    assert same(weights(trainer), expected)


def killable(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, '-m', 'composer_sam', 'train', str(LM / 'sam.yaml'), *TINY, *DROPOUT]
    command += ['max_duration=150ba', 'save_interval=1ba', 'autoresume=true', 'run_name=killed']
    command += [f'save_folder={folder}', 'trainer.save_num_checkpoints_to_keep=2']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def model_of(process: subprocess.Popen[bytes], folder: Path) -> dict[str, Tensor]:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-3000:]
    state = torch.load(folder / 'latest-rank0.pt', weights_only=False)['state']
    assert state['timestamp']['Timestamp']['batch'] == 150
    return state['model']


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    moments, killed = random.Random(0), tmp_path / 'killed'
    for _ in range(3):
        process = killable(killed)
        seen = set(killed.glob('ep*')) if killed.exists() else set()
        deadline = time.monotonic() + 120
        while process.poll() is None and not ({*killed.glob('ep*')} - seen) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, 0.3))
        assert process.poll() is None, process.communicate()[1].decode()[-3000:]
        process.send_signal(signal.SIGKILL)
        process.communicate()
    disturbed = model_of(killable(killed), killed)
    assert same(disturbed, model_of(killable(tmp_path / 'whole'), tmp_path / 'whole'))


class Recomputed(Callback):
    """The number of forwards of the first block in the first step."""

    def __init__(self, reentrant: bool | None) -> None:
        self.reentrant = reentrant
        self.forwards = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        del logger
        network: Any = state.model.model
        if self.reentrant is not None:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': self.reentrant})
        network.transformer.h[0].mlp.register_forward_pre_hook(self._count)

    def _count(self, *arguments: object) -> None:
        del arguments
        self.forwards += 1


def test_sam_with_gradient_checkpointing_and_dropout_is_sam_without() -> None:
    """Dropout draws the same masks again when a block is computed a second time, in both passes."""
    quick = [*DROPOUT, 'max_duration=6ba', 'device_train_microbatch_size=4']
    plain = Recomputed(None)
    expected = fit('sam', *quick, callbacks=(plain,))
    assert not same(expected, fit('sam', 'max_duration=6ba', 'device_train_microbatch_size=4'))  # dropout is at work
    by_key = Recomputed(None)
    assert same(fit('sam', *quick, 'model.gradient_checkpointing=true', callbacks=(by_key,)), expected)
    for reentrant in (False, True):
        found = Recomputed(reentrant)
        assert same(fit('sam', *quick, callbacks=(found,)), expected), reentrant
        trained = 6 * 2 * 2  # steps, passes, micro-batches; evaluation recomputes nothing
        assert found.forwards - plain.forwards == by_key.forwards - plain.forwards == trained


def own_trainer(data: Any, model: Any, *algorithms: Any, **settings: Any) -> Trainer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Trainer(
        model=model,
        train_dataloader=data.train,
        optimizers=torch.optim.AdamW(trained, lr=0.01),
        algorithms=list(algorithms),
        device='cpu',
        progress_bar=False,
        **{'max_duration': '5ba', **settings},
    )


def test_tied_embeddings_stay_tied_and_count_once() -> None:
    passes = Passes()
    trainer = build('sam', 'max_duration=3ba', callbacks=(passes,))
    trainer.fit()
    network: Any = trainer.state.model.model  # pyright: ignore[reportAttributeAccessIssue]
    assert network.lm_head.weight is network.transformer.wte.weight
    assert 'model.transformer.wte.weight' in passes.moved
    assert [step[1] for step in passes.lengths] == pytest.approx([0.05] * 3, rel=1e-4)
    trainer.close()


def test_a_frozen_base_is_never_moved() -> None:
    data, model = data_and_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_('.h.1.' in name)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    passes = Passes()
    trainer = own_trainer(data, model, SAM(rho=0.05), callbacks=[passes])
    trainer.fit()
    trainer.close()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == passes.moved == {name for name in before if '.h.1.' in name}
    assert [step[1] for step in passes.lengths] == pytest.approx([0.05] * 5, rel=1e-4)


def test_sam_on_lora_adapters(tmp_path: Path) -> None:
    """The adapters are perturbed and trained, the base is neither; a resumed run is the undisturbed one."""
    peft = pytest.importorskip('peft', reason='peft is not installed: pip install --no-deps "peft<0.17"')
    adapter = peft.LoraConfig(r=2, target_modules=['c_attn'], fan_in_fan_out=True, task_type='CAUSAL_LM')

    def start(**settings: Any) -> Trainer:
        data, model = data_and_model()
        torch.manual_seed(3)
        adapted = HuggingFaceModel(model.model, model.tokenizer, peft_config=adapter)
        return own_trainer(data, adapted, SAM(rho=0.05), seed=3, run_name='lora', **settings)

    passes = Passes()
    whole = start(callbacks=[passes], max_duration='6ba')
    before = weights(whole)
    whole.fit()
    after = weights(whole)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if 'lora_' in name}
    assert passes.moved <= changed
    saved = {'save_folder': str(tmp_path), 'save_interval': '3ba', 'autoresume': True}
    first = start(**saved, max_duration='3ba')
    first.fit()
    first.close()
    second = start(**saved, max_duration='6ba')
    assert second.state.timestamp.batch.value == 3
    second.fit()
    assert same(weights(second), after)


@pytest.mark.parametrize('method', registry)
def test_every_method_trains_a_language_model(method: str) -> None:
    overlay = OVERLAYS[method.lower()]
    attention = 'model.attention=' + ('eager' if needs_graph(method) else 'sdpa')
    history = History()
    trainer = build('adamw', 'max_duration=3ba', attention, overlays=(overlay,), callbacks=(history,))
    before = weights(trainer)
    trainer.fit()
    trainer.close()
    after = weights(trainer)
    assert history.steps == 3
    assert all(torch.isfinite(value).all() for value in after.values()) and not same(before, after)


def test_the_first_pass_can_see_a_part_of_the_batch() -> None:
    passes = Passes()
    fit('sam', 'max_duration=2ba', 'algorithms.sam.ascent_fraction=0.25', callbacks=(passes,))
    assert passes.sequences == [[2, 8]] * 2


def test_early_stopping_chooses_by_validation_sequences() -> None:
    history = History()
    fit(
        *('adamw', 'max_duration=2ep', 'eval_interval=1ep', 'early_stopping=true', 'data.validation_fraction=0.2'),
        callbacks=(history,),
    )
    assert history.validation['epoch'] == history.test['epoch'] == [1, 2]
    assert history.stop is not None
    assert history.stop.validation == max(history.validation['accuracy'])


def test_a_comparison_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = [str(LM / f'{name}.yaml') for name in ('adamw', 'sam')]
    quick = [*TINY, 'max_duration=2ba', '--jobs', '1']
    assert main(['compare', *recipes, '--seeds', '2', *quick, '--out', str(tmp_path / 'out')]) == 0
    runs = json.loads((tmp_path / 'out' / 'results.json').read_text())['runs']
    assert [(run['recipe'].split(',')[0], run['seed']) for run in runs] == [
        (name, seed) for seed in (17, 18) for name in ('AdamW', 'SAM')
    ]
    assert all(0 < run['test']['loss'][-1] < math.log(257) for run in runs)
    assert 'AdamW' in capsys.readouterr().out


def test_the_command_reports_perplexity(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['train', str(LM / 'adamw.yaml'), *TINY, 'max_duration=4ba']) == 0
    captured = capsys.readouterr()
    assert ', perplexity ' in captured.out
    assert 'causal_lm with ' in captured.err and 'warning' not in captured.err and 'loss_type' not in captured.err


def test_a_checkpoint_gives_network_and_tokenizer_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Composer's own function, which writes the tokenizer beside the current directory."""
    monkeypatch.chdir(tmp_path)
    fit('adamw', 'max_duration=1ba', f'save_folder={tmp_path}/run', 'save_interval=1ba')
    network, tokenizer = HuggingFaceModel.hf_from_composer_checkpoint(str(tmp_path / 'run' / 'latest-rank0.pt'))
    assert tokenizer is not None
    assert (network.config.vocab_size, network.config.n_layer, len(tokenizer)) == (257, 2, 257)
    assert tokenizer.encode('é') == [0xC3, 0xA9]


def test_a_saved_network_is_fine_tuned(tmp_path: Path) -> None:
    trainer = build('adamw', 'max_duration=8ba')
    trainer.fit()
    trainer.close()
    network: Any = trainer.state.model.model  # pyright: ignore[reportAttributeAccessIssue]
    network.save_pretrained(tmp_path)
    recipe = ['model.config=null', f'model.root={tmp_path}']
    tiny = [one for one in TINY if not one.startswith('model.config')]
    start = load_recipe(LM / 'sam.yaml', overrides=[*tiny, *recipe, 'max_duration=3ba'])
    again = build_trainer(start)
    assert same(weights(again), weights(trainer))
    again.fit()
    again.close()
    assert not same(weights(again), weights(trainer))


def test_sharpness_is_measured_in_training_and_of_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = 'callbacks.sharpness_monitor={interval: 2ba, samples: 8, measures: [loss, sam_sharpness]}'
    logged = Logged()
    trainer = build('adamw', monitor, 'max_duration=2ba', f'save_folder={tmp_path}', 'save_interval=2ba')
    trainer.logger.destinations = (*trainer.logger.destinations, logged)
    trainer.fit()
    trainer.close()
    assert logged.values['sharpness/sam_sharpness'][0] > 0
    assert main(['sharpness', str(tmp_path / 'latest-rank0.pt'), '--samples', '8']) == 0
    assert 'sharpness' in capsys.readouterr().out

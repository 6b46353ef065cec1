"""Composer's callbacks show with us what they show without us: batches, not passes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer import Callback, Trainer
from composer.algorithms import GradientClipping
from composer.callbacks import (
    ActivationMonitor,
    CheckpointSaver,
    EarlyStopper,
    LRMonitor,
    MemoryMonitor,
    NaNMonitor,
    OptimizerMonitor,
    RuntimeEstimator,
    SpeedMonitor,
    ThresholdStopper,
    memory_monitor,
)
from composer.core import State
from composer.loggers import InMemoryLogger, Logger
from composer.metrics import CrossEntropy
from composer.models import ComposerClassifier
from composer.optim import DecoupledAdamW, LinearScheduler
from digits import BATCH, Digits, Recorder, logged_by, network
from torch import Tensor
from torch.utils.data import DataLoader

from composer_sam import GAM, SAM, registry
from tests.problems import gradient

BATCHES = 8
OURS: dict[str, Callable[[], list[Any]]] = {
    'every second step by SAM': lambda: [SAM(interval=2)],
    'GAM': lambda: [GAM()],
}
# The callbacks that log or act at the end of batches; the others have tests of their own.
CALLBACKS: dict[str, Callable[[], Callback]] = {
    'OptimizerMonitor': lambda: OptimizerMonitor(batch_log_interval=2),
    'SpeedMonitor': lambda: SpeedMonitor(window_size=2),
    'MemoryMonitor': MemoryMonitor,
    'LRMonitor': LRMonitor,
    'NaNMonitor': NaNMonitor,
    'ActivationMonitor': lambda: ActivationMonitor('2ba', only_log_wandb=False),
    'RuntimeEstimator': lambda: RuntimeEstimator(skip_batches=1),
}
beside = pytest.mark.parametrize('ours', OURS)


class _Model(ComposerClassifier):
    """Counts the batches it is asked the operations of, as SpeedMonitor does for each it counts."""

    def __init__(self) -> None:
        super().__init__(network(), num_classes=10, train_metrics=CrossEntropy())
        self.asked = 0

    def flops_per_batch(self, batch: Any) -> float:
        del batch
        self.asked += 1
        return 1e6


def _momentum(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _reporting(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Of Composer's optimizers the one that reports most."""
    return DecoupledAdamW(parameters, lr=1e-2)


def _trainer(
    *callbacks: Callback,
    algorithms: list[Any],
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = _momentum,
    **settings: Any,
) -> Trainer:
    torch.manual_seed(7)
    model = _Model()
    return Trainer(
        **{
            'model': model,
            'train_dataloader': DataLoader(Digits(augment=False), batch_size=BATCH, shuffle=True),
            'optimizers': optimizer(model.parameters()),
            'algorithms': algorithms,
            'callbacks': list(callbacks),
            'loggers': [InMemoryLogger()],
            'schedulers': LinearScheduler(1.0, 0.2),
            'max_duration': f'{BATCHES}ba',
            'seed': 11,
            'device': 'cpu',
            'progress_bar': False,
            **settings,
        }
    )


OURS_LOGGED = {name.lower() for name in registry}


def _logged(trainer: Trainer) -> dict[str, list[tuple[int, Any]]]:
    """Under each key but our own the batches at which something was logged, and what."""
    entries = {key: found for key, found in logged_by(trainer).items() if key.split('/')[0] not in OURS_LOGGED}
    return {key: [(time.batch.value, value) for time, value in found] for key, found in entries.items()}


def _times(trainer: Trainer) -> dict[str, list[int]]:
    return {key: [batch for batch, _ in entries] for key, entries in _logged(trainer).items()}


@functools.cache
def _logged_anyway() -> set[str]:
    trainer = _trainer(algorithms=[])
    trainer.fit()
    return set(_logged(trainer))


# Two of the callbacks say what they think of a CPU and of being asked often.
@pytest.mark.filterwarnings('ignore:The memory monitor only works on CUDA:UserWarning')
@pytest.mark.filterwarnings('ignore:Currently the ActivationMonitor:UserWarning')
@beside
@pytest.mark.parametrize('name', CALLBACKS)
def test_the_same_is_logged_at_the_same_batches_and_as_often(name: str, ours: str) -> None:
    times = []
    for algorithms in ([], OURS[ours]()):
        trainer = _trainer(CALLBACKS[name](), algorithms=algorithms, optimizer=_reporting)
        trainer.fit()
        times.append(_times(trainer))
    assert times[0] == times[1]
    silent = name in ('MemoryMonitor', 'NaNMonitor')  # the one without a GPU, the other always
    assert (set(times[0]) > _logged_anyway()) == (not silent)


# What is logged.


@beside
@pytest.mark.parametrize('clipped', [False, True])
def test_optimizer_monitor_logs_the_norms_of_what_the_base_optimizer_was_given(ours: str, clipped: bool) -> None:
    """That is, on a perturbed step, the direction, after clipping; not the gradient of any pass."""
    method = OURS[ours]()
    clipping = [GradientClipping('norm', 0.1)] if clipped else []
    trainer = _trainer(OptimizerMonitor(batch_log_interval=1), algorithms=[*method, *clipping])
    model, given = trainer.state.model, []
    (base,) = trainer.state.optimizers
    base.register_step_post_hook(
        lambda *_: given.append({n: gradient(p).norm().item() for n, p in model.named_parameters()})
    )
    trainer.fit()
    logged = {key: [value for _, value in entries] for key, entries in _logged(trainer).items()}
    assert len(given) == BATCHES
    for name in given[0]:
        assert logged[f'l2_norm/grad/{name}'] == [norms[name] for norms in given]
    totals = [math.hypot(*norms.values()) for norms in given]
    assert logged['l2_norm/grad/global'] == pytest.approx(totals, rel=1e-5)
    assert max(totals) < 0.1001 if clipped else max(totals) > 0.2


@beside
def test_optimizer_monitor_reads_the_base_optimizer_s_own_report(ours: str) -> None:
    """DecoupledAdamW reports its moments and updates; the wrapper passes the question on."""
    model = _Model()
    base = DecoupledAdamW(model.parameters(), lr=1e-2)
    trainer = _trainer(OptimizerMonitor(batch_log_interval=1), algorithms=OURS[ours](), model=model, optimizers=base)
    trainer.fit()
    logged = _logged(trainer)
    for name, parameter in model.named_parameters():
        moment = base.state[parameter]['exp_avg'].norm().item()
        assert logged[f'l2_norm/moment/{name}'][-1] == (BATCHES, moment)
        assert logged[f'l2_norm/param/{name}'][-1] == (BATCHES, parameter.norm().item())


@beside
def test_speed_monitor_counts_batches_and_samples_not_passes(ours: str) -> None:
    for algorithms in ([], OURS[ours]()):
        monitor = SpeedMonitor(window_size=2)
        trainer = _trainer(monitor, algorithms=algorithms)
        trainer.fit()
        assert list(monitor.history_samples) == [BATCH * (BATCHES - 2), BATCH * (BATCHES - 1), BATCH * BATCHES]
        assert trainer.state.model.asked == BATCHES
        logged = _logged(trainer)
        seconds = monitor.history_wct[-1] - monitor.history_wct[0]
        assert logged['throughput/batches_per_sec'][-1] == (BATCHES, pytest.approx(2 / seconds))
        assert logged['throughput/samples_per_sec'][-1] == (BATCHES, pytest.approx(2 * BATCH / seconds))
        # One pass's operations: what the methods compute beyond them is not in Composer's count.
        assert logged['throughput/flops_per_sec'][-1] == (BATCHES, pytest.approx(2e6 / seconds))


@beside
def test_lr_monitor_logs_the_same_rates_under_the_same_name(ours: str) -> None:
    rates = []
    for algorithms in ([], OURS[ours]()):
        trainer = _trainer(LRMonitor(), algorithms=algorithms)
        trainer.fit()
        rates.append(_logged(trainer)['lr-SGD/group0'])
    assert rates[0] == rates[1]
    assert len({rate for _, rate in rates[0]}) == BATCHES


@beside
def test_checkpoint_saver_writes_the_same_files(ours: str, tmp_path: Path) -> None:
    names = []
    for folder, algorithms in (('alone', []), ('beside', OURS[ours]())):
        saver = CheckpointSaver(
            tmp_path / folder, 'ep{epoch}-ba{batch}.pt', save_interval='3ba', latest_filename='latest'
        )
        _trainer(saver, algorithms=algorithms).fit()
        names.append(sorted(path.name for path in (tmp_path / folder).iterdir()))
    assert names[0] == names[1]
    assert [name for name in names[0] if name != 'latest'] == ['ep0-ba3.pt', 'ep1-ba6.pt', 'ep1-ba8.pt']


@pytest.mark.filterwarnings('ignore:The memory monitor only works on CUDA:UserWarning')
@pytest.mark.skipif(torch.cuda.is_available(), reason='stands in for what a GPU reports')
@beside
def test_memory_monitor_reports_once_a_batch(ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens to an event that is fired per pass, and is asked when the passes are over."""
    seen: list[int] = []
    # It asks the first parameter for its device, and reports where that is a GPU.
    monkeypatch.setattr(memory_monitor, 'next', lambda _: SimpleNamespace(device=torch.device('cuda')), raising=False)
    times = []
    for algorithms in ([], OURS[ours]()):
        recorder = Recorder()
        monkeypatch.setattr(
            memory_monitor, '_get_memory_report', lambda _, r=recorder: {'peak': seen.append(r.passes[-1])}
        )
        trainer = _trainer(MemoryMonitor(), recorder, algorithms=algorithms)
        seen.clear()
        trainer.fit()
        assert seen == recorder.passes  # each report after the batch's last pass
        times.append(_times(trainer)['memory/peak'])
    assert times[0] == times[1] == list(range(BATCHES))


# What stops a run.


@beside
@pytest.mark.parametrize('stopper', ['EarlyStopper', 'ThresholdStopper'])
def test_stoppers_judge_by_the_first_pass_s_loss(stopper: str, ours: str) -> None:
    patience, least, threshold = 1, 0.3, 2.0
    stoppers = {
        'EarlyStopper': lambda: EarlyStopper(
            'CrossEntropy', 'train', 'less', min_delta=least, patience=f'{patience}ba'
        ),
        'ThresholdStopper': lambda: ThresholdStopper(
            'CrossEntropy', 'train', threshold, comp='less', stop_on_batch=True
        ),
    }
    for algorithms in ([], OURS[ours]()):
        recorder = Recorder()
        trainer = _trainer(stoppers[stopper](), recorder, algorithms=algorithms, max_duration='40ba', schedulers=None)
        trainer.fit()
        losses = [of_batch[0] for of_batch in recorder.losses]
        rule = {
            'EarlyStopper': lambda losses=losses: _stops_early(losses, least, patience),
            'ThresholdStopper': lambda losses=losses: next(i for i, loss in enumerate(losses, 1) if loss < threshold),
        }[stopper]
        assert 2 < len(losses) < 40
        assert trainer.state.timestamp.batch == rule() == len(losses)
        if algorithms:
            last = [of_batch[-1] for of_batch in recorder.losses]
            assert last != losses, 'the passes cannot be told apart'


def _stops_early(losses: list[float], least: float, patience: int) -> int | None:
    """The batch after which there was no improvement by ``least`` for more than ``patience`` batches."""
    best, best_at = math.inf, 0
    for batch, loss in enumerate(losses, 1):
        if best - loss > least:
            best, best_at = loss, batch
        if batch - best_at > patience:
            return batch
    return None


def _spoil(trainer: Trainer, at: int, by: float) -> None:
    """Add ``by`` to the loss of every step's pass ``at``, where there is one; its gradient stays as it is."""
    model: Any = trainer.state.model
    loss = model.loss

    def spoiled(outputs: Tensor, batch: Any) -> Tensor:
        index = max(getattr(trainer.state.optimizers[0], 'pass_index', 0), 0)
        return loss(outputs, batch) + (by if index == at else 0.0)

    model.loss = spoiled


@beside
def test_nan_monitor_stops_at_a_nan_of_the_loss(ours: str) -> None:
    for algorithms in ([], OURS[ours]()):
        trainer = _trainer(NaNMonitor(), algorithms=algorithms)
        _spoil(trainer, at=0, by=math.nan)
        with pytest.raises(RuntimeError, match='Train loss contains a NaN'):
            trainer.fit()
        assert trainer.state.timestamp.batch == 0


@beside
def test_nan_monitor_lets_an_infinite_loss_of_a_further_pass_go(ours: str) -> None:
    """And nobody is shown it."""
    trainer = _trainer(NaNMonitor(), algorithms=OURS[ours]())
    _spoil(trainer, at=1, by=math.inf)
    trainer.fit()
    assert all(math.isfinite(loss) for _, loss in _logged(trainer)['loss/train/total'])
    assert all(torch.isfinite(p).all() for p in trainer.state.model.parameters())


@beside
def test_nan_monitor_stops_at_a_nan_of_a_further_pass(ours: str) -> None:
    """It is asked after every pass, so a NaN at perturbed weights is not stepped on."""
    trainer = _trainer(NaNMonitor(), algorithms=OURS[ours]())
    _spoil(trainer, at=1, by=math.nan)
    with pytest.raises(RuntimeError, match='Train loss contains a NaN'):
        trainer.fit()
    first_perturbed = 2 if 'second' in ours else 1
    assert trainer.state.timestamp.batch == first_perturbed - 1
    assert all(torch.isfinite(p).all() for p in trainer.state.model.parameters())


# A callback of one's own.


class _Events(Callback):
    """How often each event was fired, and in which pass."""

    def __init__(self) -> None:
        self.batches = 0
        self.started: list[int] = []
        self.ended: list[int] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        del state, logger
        self.batches += 1

    def before_train_batch(self, state: State, logger: Logger) -> None:
        del logger
        self.started.append(getattr(state.optimizers[0], 'pass_index', -1))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        del logger
        self.ended.append(getattr(state.optimizers[0], 'pass_index', -1))


@pytest.mark.parametrize(
    ('algorithms', 'of_two_batches'),
    [([], [-1, -1]), ([SAM(interval=2)], [-1, 0, 1]), ([GAM()], [0, 1, 2, 3, 0, 1, 2, 3])],
    ids=['alone', 'every second step by SAM', 'GAM'],
)
def test_the_index_of_the_pass_tells_a_callback_of_your_own_which_events_begin_a_batch(
    algorithms: list[Any], of_two_batches: list[int]
) -> None:
    events = _Events()
    _trainer(events, algorithms=algorithms).fit()
    assert events.batches == BATCHES
    assert events.started == events.ended == of_two_batches * (BATCHES // 2)
    assert sum(index <= 0 for index in events.started) == BATCHES

"""The monitor in the real Trainer: what it logs, and that training goes on bit for bit as without it."""

from __future__ import annotations

import dataclasses
import inspect
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, DataSpec, Trainer
from composer.core import State
from composer.loggers import InMemoryLogger, Logger
from composer.models import ComposerClassifier
from quadratic import classifier
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from composer_sam import SAM
from composer_sam.diagnostics import MEASURES, MeasureOptions, Objective, measure
from composer_sam.trainers.composer import SharpnessMonitor

SIZE = 40


def streams() -> Any:
    """The global random streams of Python, NumPy and torch."""
    numpy: Any = np.random.get_state()
    return random.getstate(), numpy[1].tolist(), numpy[2:], torch.get_rng_state().tolist()


class Augmented(Dataset):
    """Samples that draw from all three global random streams, in order of their class."""

    def __init__(self, augment: bool = True):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SIZE, 6, generator=generator)
        self.y = torch.arange(SIZE) * 4 // SIZE
        self.augment = augment

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + torch.randn(6) + float(np.random.rand()) if self.augment else 0.0
        return self.x[index] + noise, self.y[index]


class Streams(Callback):
    """The random streams and losses of every step, and gradients and modes as they stand at the end of a batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def before_forward(self, state: State, logger: Logger) -> None:
        self.seen.append(streams())

    def batch_end(self, state: State, logger: Logger) -> None:
        self.seen.append(torch.as_tensor(state.loss).item())
        self.seen.append([p.grad is None or p.grad.tolist() for p in state.model.parameters()])
        self.seen.append([module.training for module in state.model.modules()])


def build(*callbacks: Callback, algorithms: Any = (), loggers: Any = (), **options: Any) -> Trainer:
    model = ComposerClassifier(classifier(torch.float32), num_classes=4)
    loader = DataLoader(Augmented(), batch_size=8, shuffle=True)
    arguments: dict[str, Any] = {
        'train_dataloader': loader,
        'eval_dataloader': DataLoader(Augmented(augment=False), batch_size=16),
        'max_duration': '3ep',
        **options,
    }
    return Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        seed=5,
        callbacks=list(callbacks),
        algorithms=list(algorithms),
        loggers=list(loggers),
        progress_bar=False,
        device='cpu',
        **arguments,
    )


def logged(logger: InMemoryLogger, name: str) -> list[tuple[int, float]]:
    return [(int(time.batch), value) for time, value in logger.data.get(f'sharpness/{name}', [])]


@pytest.mark.parametrize('algorithms', [(), (SAM(rho=0.1),)])
@pytest.mark.parametrize('batches', ['train', 'eval'])
def test_training_is_bit_identical_to_training_without_it(algorithms: Any, batches: str) -> None:
    runs = []
    monitor = SharpnessMonitor('2ba', batches, samples=24, measures=MEASURES, probes=6, steps=2)
    for callbacks in ([], [monitor]):
        steps = Streams()
        trainer = build(steps, *callbacks, algorithms=algorithms)
        trainer.fit()
        optimizer = trainer.state.optimizers[0].state_dict()
        end = streams()
        tensors = [v.tolist() for v in trainer.state.model.state_dict().values()]
        runs.append((steps.seen, tensors, str(optimizer), end))
    assert runs[0] == runs[1]


def test_logs_what_measure_says_at_every_interval_and_at_the_end() -> None:
    logger = InMemoryLogger()
    trainer = build(SharpnessMonitor('2ep', samples=24, measures=MEASURES, probes=6, steps=2), loggers=[logger])
    trainer.fit()
    for name in (*MEASURES, 'trace_stderr', 'seconds'):
        assert [batch for batch, _ in logged(logger, name)] == [10, 15], name
    # Sorted by class: the first 24 samples would have hardly more than two of the four.
    dataset = Augmented()
    random_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()  # a loader's seed for its workers
    samples = [dataset[index * SIZE // 24] for index in range(24)]
    random.setstate(random_state[0])
    np.random.set_state(random_state[1])
    torch.set_rng_state(random_state[2])
    x, y = (torch.stack(parts) for parts in zip(*samples, strict=True))
    assert sorted(set(y.tolist())) == [0, 1, 2, 3]
    expected = measure(trainer.state.model, None, [(x, y)], microbatch=8, probes=6, steps=2)
    for name in MEASURES:
        assert logged(logger, name)[-1][1] == pytest.approx(getattr(expected, name), rel=1e-5), name


def test_evaluation_data_and_batches_of_ones_own() -> None:
    logger = InMemoryLogger()
    trainer = build(SharpnessMonitor('1ep', 'eval', samples=SIZE, measures=['loss']), loggers=[logger])
    trainer.fit()
    data = Augmented(augment=False)
    expected = Objective(trainer.state.model, None, [(data.x, data.y)]).value()
    assert logged(logger, 'loss')[-1][1] == pytest.approx(expected, rel=1e-6)
    own = InMemoryLogger()
    spec = DataSpec([(data.x - 1, data.y)], batch_transforms=lambda batch: (batch[0] + 1, batch[1]))
    build(SharpnessMonitor('1ep', spec, samples=SIZE, measures=['loss']), loggers=[own]).fit()
    assert logged(own, 'loss') == [(batch, pytest.approx(value, rel=1e-6)) for batch, value in logged(logger, 'loss')]
    part = InMemoryLogger()
    build(SharpnessMonitor('1ep', [(data.x, data.y)], samples=5, measures=['loss']), loggers=[part]).fit()
    assert logged(part, 'loss') != logged(logger, 'loss')


def test_once_where_an_epoch_ends_with_training_and_again_in_a_second_fit() -> None:
    logger = InMemoryLogger()
    trainer = build(SharpnessMonitor('1ep', samples=8, measures=['loss']), loggers=[logger])
    trainer.fit()
    assert [batch for batch, _ in logged(logger, 'loss')] == [5, 10, 15]
    trainer.fit(duration='1ep')
    assert [batch for batch, _ in logged(logger, 'loss')] == [5, 10, 15, 20]


def test_what_cannot_be_measured_is_left_out_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Diverge(Callback):
        def batch_end(self, state: State, logger: Logger) -> None:
            if state.timestamp.epoch.value == 1:
                next(state.model.parameters()).data.fill_(float('nan'))

    logger = InMemoryLogger()
    trainer = build(Diverge(), SharpnessMonitor(samples=8, steps=1), loggers=[logger])
    trainer.fit()
    assert [batch for batch, _ in logged(logger, 'top_eigenvalue')] == [5]
    assert [batch for batch, _ in logged(logger, 'sam_sharpness')] == [5]
    assert len(logged(logger, 'loss')) == 3
    assert 'sharpness/top_eigenvalue is left out at batch 10: the Hessian product is not finite' in caplog.text
    assert trainer.state.timestamp.batch == 15


def test_parameters_frozen_during_training_are_no_longer_measured() -> None:
    class Freeze(Callback):
        def epoch_start(self, state: State, logger: Logger) -> None:
            if state.timestamp.epoch.value == 1:
                next(state.model.parameters()).requires_grad_(False)

    logger = InMemoryLogger()
    trainer = build(Freeze(), SharpnessMonitor(samples=8), loggers=[logger])
    trainer.fit()
    assert len(logged(logger, 'top_eigenvalue')) == 3
    assert not next(trainer.state.model.parameters()).requires_grad


# Refusals.


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'interval': '0ep'}, "interval must be a duration > 0, got '0ep'"),
        ({'batches': 'test'}, "batches must be 'train', 'eval' or batches of your own, got 'test'"),
        ({'samples': 0}, 'samples must be an integer >= 1, got 0'),
        ({'samples': None}, 'samples must be an integer >= 1, got None'),
        ({'microbatch': 0}, 'microbatch must be an integer >= 1 or None, got 0'),
        ({'measures': ['sharpness']}, r"measures must be some of .*, got \['sharpness'\]"),
        ({'k': -1}, 'k must be an integer >= 1, got -1'),
        ({'probes': 2}, 'probes must be an integer >= 6, got 2'),
        ({'rho': 0}, 'rho must be a finite number > 0, got 0'),
        ({'eta': -1.0}, 'eta must be a finite number >= 0, got -1.0'),
        ({'ascent': 'x'}, "ascent must be one of 'first_order', 'projected', got 'x'"),
    ],
)
def test_bad_values_are_named_when_it_is_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharpnessMonitor(**arguments)


def test_its_keywords_are_the_options_of_measure() -> None:
    given, known = (inspect.signature(function).parameters for function in (SharpnessMonitor, measure))
    for field in dataclasses.fields(MeasureOptions):
        assert given[field.name] == known[field.name]
        assert given[field.name].default == field.default
    assert not any(p.kind is p.VAR_KEYWORD for p in given.values())


def test_without_scipy_it_is_refused_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'scipy.sparse.linalg', None)
    with pytest.raises(ModuleNotFoundError, match=r"eigenvalues .*: pip install 'composer-sam\[diagnostics\]'$"):
        SharpnessMonitor()
    SharpnessMonitor(measures=['loss', 'sam_sharpness'])


def test_without_composer_the_error_names_the_extra() -> None:
    code = (
        'import sys; sys.modules["composer"] = None; import composer_sam\n'
        'try: composer_sam.SharpnessMonitor\n'
        'except ModuleNotFoundError as error: print(error)'
    )
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    expected = (
        "composer_sam.trainers.composer needs composer, which is not installed: pip install 'composer-sam[composer]'"
    )
    assert found.stdout.strip() == expected


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from ((torch.zeros(6), 0) for _ in range(SIZE))


@pytest.mark.parametrize(
    ('monitor', 'options', 'message'),
    [
        (
            {},
            {'train_dataloader': DataLoader(Stream(), batch_size=8), 'max_duration': '9ba'},
            "batches='train' needs .* over Stream: pass",
        ),
        ({'batches': 'eval'}, {'eval_dataloader': None}, "batches='eval' needs an eval_dataloader"),
        ({'batches': []}, {}, 'batches must hold at least one sample'),
    ],
)
def test_data_that_cannot_be_had_is_an_error_before_the_first_batch(
    monitor: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    trainer = build(SharpnessMonitor(**monitor), **options)
    with pytest.raises(ValueError, match=message):
        trainer.fit()
    assert trainer.state.timestamp.batch == 0


def test_it_is_found_without_importing_composer_for_the_rest() -> None:
    code = (
        'import sys, composer_sam, composer_sam.diagnostics; '
        'print("composer" in sys.modules, composer_sam.SharpnessMonitor.__name__)'
    )
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ['False', 'SharpnessMonitor']
    with pytest.raises(AttributeError, match='no attribute'):
        _ = __import__('composer_sam.diagnostics').diagnostics.nothing

"""A small Trainer run of one of Composer's algorithms, alone or beside ours, and what is promised of the two."""

from __future__ import annotations

import functools
import logging
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from composer import Callback, Trainer
from composer.core import Algorithm, State
from composer.loggers import Logger
from composer.models import ComposerModel
from composer_models import BATCH, PER_EPOCH
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset

from composer_sam import GAM, SAM, registry
from tests.problems import numpy_stream

__all__ = ['BATCHES', 'METHODS', 'PROMISES', 'Case', 'Run', 'run']

BATCHES = 3 * PER_EPOCH
RHO = 0.05
METHODS: dict[str, Callable[[], Algorithm]] = {'SAM': lambda: SAM(rho=RHO), 'GAM': GAM}
# The interval comes to no step: our algorithm is there, and has nothing to do.
IDLE = 'idle'


@dataclass(frozen=True, eq=False)
class Case:
    """One of Composer's algorithms, and all that is needed to see it work.

    Args:
        algorithm: makes it.
        model: makes a model that has what it acts on.
        data: makes the data set.
        acted: whether it did its work in a run.
        because: what it does, and why that goes with several passes.
        follows_weights: whether the weights decide which samples it picks, so that two runs soon see different ones.
        masks: what it keeps for itself of its random draws, after a forward.
        broken: the promises that are not kept beside it, and what happens instead.
    """

    algorithm: Callable[[], Algorithm]
    model: Callable[[], ComposerModel]
    data: Callable[[], Dataset]
    acted: Callable[[Run], bool]
    because: str
    follows_weights: bool = False
    masks: Callable[[nn.Module], list[Tensor]] = lambda model: []
    broken: dict[str, str] = field(default_factory=dict)


@dataclass
class OnePass:
    """What one pass saw and drew, and the weights it was taken at."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[Any] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    masks: list[Any] = field(default_factory=list)
    # The random streams at the start and the end of every forward: between equal ones lie equal draws.
    streams: list[Any] = field(default_factory=list)
    # Which parameters got a gradient: not those of a block that was left out.
    reached: list[bool] = field(default_factory=list)

    def saw(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != 'weights'}


@dataclass(eq=False)
class Watch(Callback):
    """Records every pass of every step, and what the base optimizer was given and made of it."""

    case: Case
    passes: list[list[OnePass]] = field(default_factory=list)
    given: list[dict[str, Tensor]] = field(default_factory=list)
    before: list[dict[str, Tensor]] = field(default_factory=list)
    after: list[dict[str, Tensor]] = field(default_factory=list)
    buffers: list[dict[str, Tensor]] = field(default_factory=list)
    under_way: OnePass | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        del logger
        model, case = state.model, self.case

        # Functions, not methods: an algorithm that copies the model would copy this callback with its methods.
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            del module
            if self.under_way is not None:
                self.under_way.weights = self.under_way.weights or parameters(model)
                self.under_way.inputs.append(tree_map(_copy, args[0]))
                self.under_way.streams.append(streams())

        def leave(module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
            del module, args
            if self.under_way is not None:
                self.under_way.outputs.append([leaf.shape for leaf in tree_leaves(outputs) if hasattr(leaf, 'shape')])
                self.under_way.streams.append(streams())
                self.under_way.masks.append([mask.clone() for mask in case.masks(model)])

        model.register_forward_pre_hook(enter)
        model.register_forward_hook(leave)
        self._watch_loss(model)
        optimizer = state.optimizers[0]
        base = getattr(optimizer, 'base_optimizer', optimizer)
        base.register_step_pre_hook(lambda *_: self.before.append(parameters(model)))
        base.register_step_post_hook(lambda *_: self.after.append(parameters(model)))
        base.register_step_post_hook(lambda *_: self.given.append(gradients(model)))
        base.register_step_post_hook(lambda *_: self.buffers.append(buffers(model)))

    def _watch_loss(self, model: Any) -> None:
        loss = model.loss

        @functools.wraps(loss)
        def watched(outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if self.under_way is not None:
                self.under_way.targets.append(tree_map(_copy, batch))
            return loss(outputs, batch, *args, **kwargs)

        model.loss = watched

    def batch_start(self, state: State, logger: Logger) -> None:
        del state, logger
        self.passes.append([])

    def before_train_batch(self, state: State, logger: Logger) -> None:
        del state, logger
        self.under_way = OnePass()
        self.passes[-1].append(self.under_way)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        del logger
        assert self.under_way is not None
        self.under_way.reached = [p.grad is not None for p in state.model.parameters()]
        self.under_way = None


@dataclass
class Run:
    """A finished run: what was watched, and the model it ended with."""

    algorithm: Algorithm
    model: Any
    optimizer: Any
    data: Any
    start: dict[str, Tensor]
    end: dict[str, Tensor]
    watch: Watch

    @property
    def first_passes(self) -> list[OnePass]:
        return [passes[0] for passes in self.watch.passes]

    @property
    def optimized(self) -> set[str]:
        """The names of the parameters in the optimizer; an unknown one counts as what it is not called."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {names.get(id(p), 'unknown') for group in self.optimizer.param_groups for p in group['params']}


@functools.cache
def run(case: Case, method: str | None = None, ours_first: bool = False) -> Run:
    """A run of the case: alone, beside one of the ``METHODS``, or beside an idle one."""
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    watch = Watch(case)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        logging.disable(logging.WARNING)
        try:
            model, data, algorithm = case.model(), case.data(), case.algorithm()
            ours = [] if method is None else [SAM(interval=10**6) if method == IDLE else METHODS[method]()]
            trainer = Trainer(
                model=model,
                train_dataloader=DataLoader(data, batch_size=BATCH, shuffle=True),
                optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
                algorithms=[*ours, algorithm] if ours_first else [algorithm, *ours],
                callbacks=[watch],
                device='cpu',
                max_duration=f'{BATCHES}ba',
                seed=11,
                progress_bar=False,
            )
            start = contents(trainer.state.model)
            trainer.fit()
            trainer.close()
        finally:
            logging.disable(logging.NOTSET)
    state = trainer.state
    return Run(algorithm, state.model, state.optimizers[0], data, start, contents(state.model), watch)


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def streams() -> tuple[Any, ...]:
    return hash(random.getstate()), numpy_stream(), torch.get_rng_state()


def _copy(item: Any) -> Any:
    return item.detach().clone() if isinstance(item, Tensor) else item


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# What is promised.


def trains(case: Case, method: str) -> None:
    ours, expected = run(case, method), registry[method]().passes
    assert [len(passes) for passes in ours.watch.passes] == [expected] * BATCHES
    assert all(torch.isfinite(value).all() for value in ours.end.values())
    assert not equal(ours.start, ours.end), 'nothing moved'
    assert not equal(run(case).end, ours.end), 'the method changes nothing'


def acts_as_alone(case: Case, method: str) -> None:
    alone, ours = run(case), run(case, method)
    assert case.acted(alone), 'it does nothing even without us'
    assert case.acted(ours)
    steps = 1 if case.follows_weights else BATCHES
    for theirs, beside_us in list(zip(alone.first_passes, ours.first_passes, strict=True))[:steps]:
        assert equal((theirs.inputs, theirs.targets), (beside_us.inputs, beside_us.targets))


def every_pass_sees_the_same(case: Case, method: str) -> None:
    for step, (first, *further) in enumerate(run(case, method).watch.passes):
        assert first.inputs, 'nothing was recorded'
        for other in further:
            for what, value in first.saw().items():
                assert equal(value, other.saw()[what]), f'{what} of a pass of step {step}'


def buffers_are_of_one_pass(case: Case, method: str) -> None:
    alone, ours = run(case).watch.buffers, run(case, method).watch.buffers
    assert len(alone) == len(ours) == BATCHES
    assert equal(alone[0], ours[0])
    counters = [name for name, buffer in alone[0].items() if not buffer.is_floating_point()]
    assert all(equal(alone[-1][name], ours[-1][name]) for name in counters)


def weights_come_back(case: Case, method: str) -> None:
    """And in between they were where the method wants them: SAM's second pass at the distance rho."""
    watch = run(case, method).watch
    for passes, before in zip(watch.passes, watch.before, strict=True):
        assert equal(passes[0].weights, before)
        for other in passes[1:]:
            offsets = [other.weights[name] - value for name, value in before.items()]
            distance = torch.linalg.vector_norm(torch.cat([offset.reshape(-1) for offset in offsets])).item()
            assert distance > 1e-6, 'a pass at the weights themselves'
            if method == 'SAM':
                assert abs(distance / RHO - 1) < 1e-3, distance


def idle_changes_nothing(case: Case, method: str) -> None:
    del method
    alone, idle = run(case), run(case, IDLE)
    assert equal(alone.end, idle.end)
    assert [len(passes) for passes in idle.watch.passes] == [1] * BATCHES
    assert equal([p.saw() for p in alone.first_passes], [p.saw() for p in idle.first_passes])


def order_does_not_matter(case: Case, method: str) -> None:
    last, first = run(case, method), run(case, method, ours_first=True)
    assert equal(last.end, first.end)


def optimizer_holds_the_same(case: Case, method: str) -> None:
    alone, ours = run(case), run(case, method)
    assert alone.optimized == ours.optimized
    assert [len(group['params']) for group in ours.optimizer.param_groups] == [len(ours.optimized)]


PROMISES: dict[str, Callable[[Case, str], None]] = {
    'it trains': trains,
    'the algorithm acts as without us': acts_as_alone,
    'every pass sees what the first saw': every_pass_sees_the_same,
    'BatchNorm and other buffers see one pass': buffers_are_of_one_pass,
    'the weights come back bit for bit': weights_come_back,
    'an interval never reached changes nothing': idle_changes_nothing,
    'the order in the list does not matter': order_does_not_matter,
    'the optimizer holds what it holds without us': optimizer_holds_the_same,
}

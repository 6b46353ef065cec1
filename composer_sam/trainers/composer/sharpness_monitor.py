"""Sharpness during training, as a Composer callback."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from composer.core import Callback, DataSpec, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch.utils.data import DataLoader, IterableDataset, Subset

from composer_sam.diagnostics.checks import NotConvergedError, NotFiniteError, check_at_least, check_count
from composer_sam.diagnostics.measure import check_options, measure
from composer_sam.diagnostics.objective import Objective
from composer_sam.diagnostics.samples import read

__all__ = ['SharpnessMonitor']

log = logging.getLogger(__name__)


class SharpnessMonitor(Callback):
    """Measures the model as it trains and logs ``sharpness/<measure>``, without touching the training.

    The same samples every time, in evaluation mode, in the weights' own precision whatever the trainer's is, with the
    model's own loss; what algorithms do to batches (MixUp, label smoothing) is not applied. Weights, optimizer,
    buffers, gradients, random streams and the training loader go on bit for bit as without the callback. The samples
    are read when fitting starts and stay in memory. A generator that the dataset draws from by itself goes on.

    Args:
        interval: how often, a Composer time string, and at the end of training.
        batches: ``'train'`` or ``'eval'`` (the first evaluator's): ``samples`` of the dataset, evenly spaced, read by a
            loader of our own in this process. Random augmentation is drawn once, from a fixed seed. Or batches of
            your own: any iterable, or a ``DataSpec``, whose transforms are applied; with several ranks each rank's own.
            For ``'train'`` a callback is not shown the transforms of a ``DataSpec``: pass it here if it has some.
        samples: :math:`\\ge 1`, over all ranks together.
        measures: which numbers, see :func:`~composer_sam.diagnostics.measure.measure`, as all that follow.
        k: how many eigenvalues, the further ones as ``sharpness/eigenvalue_2`` and so on.
        probes: Hessian products for the trace.
        rho: radius of the sharpness.
        adaptive_rho: radius of the adaptive sharpness.
        eta: of the adaptive sharpness.
        flatness_rho: radius of the first-order flatness.
        ascent: ``'projected'`` or ``'first_order'``.
        steps: of projected ascent.
        microbatch: samples per graph; by default the loader's batch size.
        seed: of everything random.
        tol: of the eigenvalues.

    Under DistributedDataParallel each rank measures its share and all log the same numbers. A number that cannot be
    had (training has diverged, Lanczos did not converge) is left out with a warning; training goes on.

    Cost:
        With the default measures about 10 Hessian products and 25 passes over ``samples`` each time.

    Raises:
        ValueError: an argument out of its range; when fitting starts, parameters sharded by FSDP, or a loader whose
            dataset cannot be read at will.

    Example:
        >>> from composer_sam.trainers.composer import SharpnessMonitor
        >>> monitor = SharpnessMonitor('5ep', samples=256)   # Trainer(callbacks=[monitor])
    """

    def __init__(
        self,
        interval: str | int | Time = '1ep',
        batches: str | Iterable[Any] | DataSpec = 'train',
        samples: int = 512,
        measures: Sequence[str] = ('loss', 'gradient_norm', 'top_eigenvalue', 'sam_sharpness'),
        *,
        k: int = 1,
        probes: int = 30,
        rho: float = 0.05,
        adaptive_rho: float = 0.5,
        eta: float = 0.01,
        flatness_rho: float = 0.2,
        ascent: str = 'projected',
        steps: int = 20,
        microbatch: int | None = None,
        seed: int = 0,
        tol: float = 1e-3,
    ):
        if Time.from_input(interval, TimeUnit.EPOCH).value <= 0:
            raise ValueError(f'interval must be longer than nothing, got {interval!r}')
        if isinstance(batches, str) and batches not in ('train', 'eval'):
            raise ValueError(f"batches must be 'train', 'eval' or batches of your own, got {batches!r}")
        check_at_least('samples', samples, 1)
        check_count('microbatch', microbatch)
        self._options: dict[str, Any] = {
            'k': k,
            'probes': probes,
            'rho': rho,
            'adaptive_rho': adaptive_rho,
            'eta': eta,
            'flatness_rho': flatness_rho,
            'ascent': ascent,
            'steps': steps,
            'tol': tol,
        }
        check_options(measures, **self._options)
        self._seed = seed
        self._measures = tuple(measures)
        self._due = create_interval_scheduler(interval)
        self._source = batches
        self._samples = samples
        self._microbatch = microbatch
        self._batches: list[Any] = []
        self._last = -1

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        super().run_event(event, state, logger)
        if state.get_elapsed_duration() is None or not self._due(state, event):
            return
        if self._last != state.timestamp.batch.value:  # the end of an epoch can be the end of training too
            self._last = state.timestamp.batch.value
            self._log(state, logger)

    def fit_start(self, state: State, logger: Logger) -> None:
        del logger
        # Reads the samples, and says now what would be refused later.
        self._batches = Objective(state.model, None, self._read(state), microbatch=self._microbatch).batches

    def _log(self, state: State, logger: Logger) -> None:
        objective = Objective(state.model, None, self._batches)
        found: dict[str, float] = {}
        seconds = 0.0
        with objective.undisturbed():
            for name in self._measures:
                # One by one: where one cannot be had the others can.
                try:
                    one = measure(objective, measures=[name], seed=self._seed, **self._options).as_dict()
                except (NotFiniteError, NotConvergedError) as error:
                    log.warning('sharpness/%s is left out at batch %d: %s', name, self._last, error)
                    continue
                seconds += one.pop('seconds')
                found |= {f'sharpness/{key}': value for key, value in one.items() if key not in ('samples', 'seed')}
        logger.log_metrics({**found, 'sharpness/seconds': seconds})

    def _read(self, state: State) -> Iterator[Any]:
        """The batches to measure on, transformed as the Trainer would."""
        source, limit = self._source, None
        if isinstance(source, str):
            if source == 'eval' and not state.evaluators:
                raise ValueError("batches='eval' needs an eval_dataloader in the Trainer, which has none")
            # A DataSpec, or what it would hold.
            source = state.train_dataloader if source == 'train' else state.evaluators[0].dataloader
        else:
            limit = -(-self._samples // dist.get_world_size())
        spec = source if isinstance(source, DataSpec) else None
        loader: Any = source if spec is None else spec.dataloader
        if limit is None:
            loader = self._own_loader(loader)
        for batch, _ in read(loader, limit, None):
            yield batch if spec is None else spec.microbatch_transforms(spec.batch_transforms(batch))

    def _own_loader(self, loader: Any) -> Iterable[Any]:
        """The same dataset in a loader of its own: evenly spaced samples, this rank's share of them."""
        dataset: Any = getattr(loader, 'dataset', None)
        if (
            not isinstance(loader, DataLoader)
            or isinstance(dataset, IterableDataset)
            or not hasattr(dataset, '__len__')
        ):
            what = type(loader).__name__ + (f' over {type(dataset).__name__}' if dataset is not None else '')
            raise ValueError(
                f'batches={self._source!r} needs a torch DataLoader over a dataset with a length, got {what}: pass '
                'batches of your own, such as a list'
            )
        count = min(self._samples, len(dataset))
        chosen = [index * len(dataset) // count for index in range(count)]
        own = chosen[dist.get_global_rank() :: dist.get_world_size()]
        size = self._microbatch or loader.batch_size or 64
        return DataLoader(Subset(dataset, own), batch_size=size, collate_fn=loader.collate_fn)

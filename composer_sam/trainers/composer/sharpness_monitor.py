"""A Composer callback that measures sharpness during training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from composer.core import Callback, DataSpec, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch.utils.data import DataLoader, IterableDataset, Subset

from composer_sam.diagnostics.checks import NotConvergedError, NotFiniteError, check_at_least, check_count
from composer_sam.diagnostics.keywords import keywords_of
from composer_sam.diagnostics.lanczos import check_eigensolver
from composer_sam.diagnostics.measure import MeasureOptions, check_measures, measure_objective
from composer_sam.diagnostics.objective import Objective
from composer_sam.diagnostics.samples import read

__all__ = ['SharpnessMonitor']

log = logging.getLogger(__name__)


class SharpnessMonitor(Callback):
    """A callback that measures the model during training and logs ``sharpness/<measure>``.

    Every measurement uses the same samples, evaluation mode, the precision of the weights (not that of the Trainer) and
    the loss of the model. Changes of batches by algorithms (MixUp, label smoothing) are not applied. The samples are
    read when fitting starts and stay in memory. Weights, optimizer, buffers, gradients, random streams and the training
    loader are bit for bit as without the callback, except for random generators of the dataset itself.

    Under DistributedDataParallel each rank measures its share of the samples and all ranks log the same numbers. A
    measure that fails (the training has diverged, or Lanczos did not converge) is left out with a warning, and training
    continues.

    Args:
        interval: the interval between measurements, a Composer time string; the end of training is measured too.
        batches: ``'train'`` or ``'eval'`` (the first evaluator) for ``samples`` evenly spaced samples of its dataset,
            read by a separate loader in this process, with random augmentation drawn once, from a fixed seed. Or your
            own batches: an iterable, or a ``DataSpec``, whose transforms are applied; each rank passes its own. The
            Trainer does not show callbacks the transforms of a ``DataSpec`` for training: if it has transforms, pass
            the ``DataSpec`` here in place of ``'train'``.
        samples: :math:`\\ge 1`, the number of samples over all ranks.
        measures: a selection of :data:`~composer_sam.diagnostics.MEASURES`. Eigenvalues after the first are logged as
            ``sharpness/eigenvalue_2`` and so on.
        microbatch: the largest number of samples in one graph; the batch size of the loader if None.
        seed: the seed of all random numbers.
        options: the fields of :class:`~composer_sam.diagnostics.MeasureOptions`.

    Cost:
        With the default measures about 10 Hessian products and 25 passes over ``samples`` for each measurement.

    Raises:
        ValueError: an argument out of its range; when fitting starts, parameters sharded by FSDP, or a loader without
            random access to its dataset.
        ModuleNotFoundError: eigenvalues are requested and SciPy is not installed.

    Example:
        >>> from composer_sam.trainers.composer import SharpnessMonitor
        >>> monitor = SharpnessMonitor('5ep', samples=256)   # Trainer(callbacks=[monitor])
    """

    @keywords_of(MeasureOptions)
    def __init__(
        self,
        interval: str | int | Time = '1ep',
        batches: str | Iterable[Any] | DataSpec = 'train',
        samples: int = 512,
        measures: Sequence[str] = ('loss', 'gradient_norm', 'top_eigenvalue', 'sam_sharpness'),
        *,
        microbatch: int | None = None,
        seed: int = 0,
        **options: Any,
    ):
        if Time.from_input(interval, TimeUnit.EPOCH).value <= 0:
            raise ValueError(f'interval must be a duration > 0, got {interval!r}')
        if isinstance(batches, str) and batches not in ('train', 'eval'):
            raise ValueError(f"batches must be 'train', 'eval' or batches of your own, got {batches!r}")
        check_at_least('samples', samples, 1)
        check_count('microbatch', microbatch)
        check_measures(measures)
        if 'top_eigenvalue' in measures:
            check_eigensolver()
        self._options = MeasureOptions(**options)
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
        if self._last != state.timestamp.batch.value:  # the end of an epoch may also be the end of training
            self._last = state.timestamp.batch.value
            self._log(state, logger)

    def fit_start(self, state: State, logger: Logger) -> None:
        del logger
        # Reads the samples, and raises errors about the data now rather than at the first measurement.
        self._batches = Objective(state.model, None, self._read(state), microbatch=self._microbatch).batches

    def _log(self, state: State, logger: Logger) -> None:
        objective = Objective(state.model, None, self._batches)
        found: dict[str, float] = {}
        seconds = 0.0
        with objective.undisturbed():
            for name in self._measures:
                # One at a time, so that a measure that fails does not affect the others.
                try:
                    one = measure_objective(objective, [name], self._options, seed=self._seed).as_dict()
                except (NotFiniteError, NotConvergedError) as error:
                    log.warning('sharpness/%s is left out at batch %d: %s', name, self._last, error)
                    continue
                seconds += one.pop('seconds')
                found |= {f'sharpness/{key}': value for key, value in one.items() if key not in ('samples', 'seed')}
        logger.log_metrics({**found, 'sharpness/seconds': seconds})

    def _read(self, state: State) -> Iterator[Any]:
        """Yield the batches to measure on, transformed as in the Trainer."""
        source, limit = self._source, None
        if isinstance(source, str):
            if source == 'eval' and not state.evaluators:
                raise ValueError("batches='eval' needs an eval_dataloader in the Trainer, which has none")
            # A DataSpec, or a loader.
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
        """Return a separate loader of the dataset, with this rank's share of evenly spaced samples."""
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

"""Composer's TensorBoard logger with one event file per run, in the folder of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import composer.loggers
from composer.core import State
from composer.loggers import Logger

__all__ = ['TensorboardLogger']


class TensorboardLogger(composer.loggers.TensorboardLogger):
    """Logs to TensorBoard. A run is one event file; a resumed run adds one.

    Composer's own logger begins a new file at every flush, every test and every epoch, and writes the
    hyper-parameters to another one at every test. This one flushes as often and keeps its file, and writes the
    hyper-parameters once, at the end.

    Args:
        log_dir: the folder in which every run has a folder of its name. If not given, the events of a run lie in its
            ``save_folder``; without one, in ``tensorboard_logs``.
        flush_interval: the number of steps between flushes.
        rank_zero_only: whether only rank 0 logs.

    Attributes:
        folder: the folder of the run, in place of ``log_dir``; None without ``save_folder``.
    """

    def __init__(self, log_dir: str | None = None, flush_interval: int = 100, rank_zero_only: bool = True) -> None:
        super().__init__(log_dir, flush_interval, rank_zero_only)
        self.folder: Path | None = None

    def init(self, state: State, logger: Logger) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        if self.folder is None:
            super().init(state, logger)
        else:
            self.run_name = state.run_name
            self.writer = SummaryWriter(log_dir=self.folder)

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value % self.flush_interval == 0:
            self._write()

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._write()

    def eval_end(self, state: State, logger: Logger) -> None:
        self._write()

    def fit_end(self, state: State, logger: Logger) -> None:
        from torch.utils.tensorboard.summary import hparams

        if self.writer is not None and self.writer.file_writer is not None:
            shown = {name: value for name, value in self.current_metrics.items() if 'metric' in name or 'loss' in name}
            results: dict[str, Any] = {f'hparams/{name}': value for name, value in shown.items()}
            for summary in hparams(self.hyperparameters, results):
                self.writer.file_writer.add_summary(summary)
            for name, value in results.items():
                self.writer.add_scalar(name, value)
        super().fit_end(state, logger)  # it closes the file, and uploads it where another logger does that

    def _write(self) -> None:
        if self.writer is not None and self.writer.file_writer is not None:
            self.writer.flush()

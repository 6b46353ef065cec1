"""A loss landscape, and the file it is stored in, while it is evaluated and afterwards."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from composer_sam.files import write_whole
from composer_sam.landscapes.subspaces import Mark

__all__ = ['Landscape', 'LandscapeError', 'Rows']

_FORMAT = 1


class LandscapeError(ValueError):
    """A request that cannot be evaluated, a file that holds no landscape, or a file that holds another one."""


@dataclass(frozen=True, eq=False)
class Landscape:
    """Losses on a grid of weights.

    Attributes:
        label: its name in pictures.
        axes: the names of the coordinates, with their units.
        coordinates: the coordinates of the grid, ascending, one array per axis.
        loss: the loss at ``[x]`` or ``[y, x]``; infinite or not a number where the outputs of the network are.
        accuracy: the accuracy at the same points, in [0, 1]; None where the network is no classifier.
        marks: the checkpoints in it, with their losses.
        about: what the losses depend on, such as samples and seed, and what else is stored with them.
    """

    label: str
    axes: tuple[str, ...]
    coordinates: tuple[np.ndarray, ...]
    loss: np.ndarray
    accuracy: np.ndarray | None
    marks: tuple[Mark, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write one ``.npz`` file: arrays, and everything else as JSON. A reader sees the whole file or none."""
        Rows(self, np.ones(self.loss.shape[0], dtype=bool)).save(path)

    @classmethod
    def load(cls, path: Path) -> Landscape:
        """Read a file that :meth:`save` wrote; nothing in the file is executed.

        Raises:
            LandscapeError: the file is no landscape, or not all of its rows have been evaluated.
        """
        rows = Rows.load(path)
        if not rows.done.all():
            raise LandscapeError(f'{path}: only {rows.done.sum()} of {len(rows.done)} rows have been evaluated')
        return rows.landscape


class Rows:
    """A landscape some rows of which have been evaluated, and the file it is stored in."""

    def __init__(self, landscape: Landscape, done: np.ndarray, accuracy: np.ndarray | None = None) -> None:
        self._landscape = landscape
        self.done = done
        self.accuracy = landscape.accuracy if accuracy is None else accuracy

    @classmethod
    def empty(cls, landscape: Landscape) -> Rows:
        """Make the landscape with all losses missing."""
        shape = tuple(axis.size for axis in reversed(landscape.coordinates))
        loss = np.full(shape, np.nan)
        return cls(dataclasses.replace(landscape, loss=loss), np.zeros(shape[0], dtype=bool), np.full(shape, np.nan))

    @property
    def landscape(self) -> Landscape:
        """The landscape with the losses so far."""
        known = self.accuracy is not None and not np.isnan(self.accuracy).all()
        return dataclasses.replace(self._landscape, accuracy=self.accuracy if known else None)

    def put(self, index: int, values: np.ndarray) -> None:
        """Set the losses and accuracies of a row."""
        assert self.accuracy is not None
        loss, accuracy = values if self._landscape.loss.ndim == 2 else values[:, 0]
        self._landscape.loss[index], self.accuracy[index], self.done[index] = loss, accuracy, True

    def mark(self, measured: Sequence[tuple[float, float]]) -> None:
        """Set the loss and the accuracy of every mark."""
        marks = [
            dataclasses.replace(mark, loss=loss, accuracy=None if math.isnan(accuracy) else accuracy)
            for mark, (loss, accuracy) in zip(self._landscape.marks, measured, strict=True)
        ]
        self._landscape = dataclasses.replace(self._landscape, marks=tuple(marks))

    def take(self, stored: Rows, path: Path) -> None:
        """Take over the rows that an earlier run stored.

        Raises:
            LandscapeError: the earlier run evaluated another landscape.
        """
        now, before = self._landscape.about, stored._landscape.about
        for key in [*now, *before]:
            if now.get(key) != before.get(key):
                raise LandscapeError(
                    f'{path} holds a landscape with another {key} ({_short(before.get(key))}, now '
                    f'{_short(now.get(key))}); choose another folder or delete that file'
                )
        self._landscape.loss[:], self.done[:] = stored._landscape.loss, stored.done
        if self.accuracy is not None and stored.accuracy is not None:
            self.accuracy[:] = stored.accuracy

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        landscape = self._landscape
        described = {
            'format': _FORMAT,
            'label': landscape.label,
            'axes': landscape.axes,
            'marks': [dataclasses.asdict(mark) for mark in landscape.marks],
            'about': landscape.about,
        }
        arrays = {'loss': landscape.loss, 'done': self.done, 'description': np.array(json.dumps(described))}
        arrays |= {f'coordinates{axis}': values for axis, values in enumerate(landscape.coordinates)}
        if self.accuracy is not None:
            arrays['accuracy'] = self.accuracy
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        write_whole(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Rows:
        """Read a file that :meth:`save` wrote.

        Raises:
            LandscapeError: the file is no landscape.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            described = json.loads(str(arrays['description']))
            if described['format'] != _FORMAT:
                raise LandscapeError(f'{path}: written in format {described["format"]}, this version reads {_FORMAT}')
            landscape = Landscape(
                label=described['label'],
                axes=tuple(described['axes']),
                coordinates=tuple(arrays[f'coordinates{axis}'] for axis in range(len(described['axes']))),
                loss=arrays['loss'],
                accuracy=arrays.get('accuracy'),
                marks=tuple(Mark(**{**mark, 'at': tuple(mark['at'])}) for mark in described['marks']),
                about=described['about'],
            )
            return cls(landscape, arrays['done'])
        except FileNotFoundError:
            raise LandscapeError(f'{path} does not exist') from None
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            if isinstance(error, LandscapeError):
                raise
            raise LandscapeError(f'{path}: not a stored landscape ({type(error).__name__}: {error})') from None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f'{text[:12]}...'

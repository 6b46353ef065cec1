"""A benchmark's report: what ran where, and its tables, printed and written as JSON and Markdown."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

__all__ = ['RESULTS', 'Report', 'Table']

RESULTS = Path(__file__).resolve().parent / 'results'
_PACKAGES = ('torch', 'torchvision', 'mosaicml', 'numpy')


@dataclass
class Table:
    """Rows under named columns; numbers are shown with four significant digits and kept in full in the JSON.

    Args:
        title: one line.
        columns: the names of the columns.
        rows: one value per column.
        note: how to read it.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)
    note: str = ''

    def add(self, *row: Any) -> None:
        if len(row) != len(self.columns):
            raise ValueError(f'the table {self.title!r} has {len(self.columns)} columns, got {len(row)} values')
        self.rows.append(row)

    def markdown(self) -> str:
        """The table in Markdown, padded so that it reads well as text too."""
        cells = [[str(column) for column in self.columns], *([_shown(value) for value in row] for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(self.columns))]
        padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
        lines = [f'| {" | ".join(line)} |' for line in padded]
        lines.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
        return '\n'.join([f'### {self.title}', '', *lines, *(['', self.note] if self.note else [])])


class Report:
    """Collects tables, prints each as it comes, and writes all of them.

    Args:
        name: name of the benchmark and of its files.
        config: every option of the run.
    """

    def __init__(self, name: str, config: dict[str, Any]):
        self.name = name
        self.config = config
        self.environment = environment()
        self.tables: list[Table] = []

    def add(self, table: Table) -> None:
        self.tables.append(table)
        print(f'\n{table.markdown()}', flush=True)

    def write(self, out: str | Path | None = None) -> Path:
        """Write ``OUT.json`` and ``OUT.md``, by default ``benchmarks/results/NAME``; returns the Markdown's path."""
        path = RESULTS / self.name if out is None else Path(out).with_suffix('')
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            'name': self.name,
            'environment': self.environment,
            'config': self.config,
            'tables': [asdict(table) for table in self.tables],
        }
        path.with_suffix('.json').write_text(json.dumps(content, indent=1, default=str) + '\n')
        markdown = path.with_suffix('.md')
        markdown.write_text(self.markdown())
        print(f'\nwritten to {markdown} and {path.with_suffix(".json").name}')
        return markdown

    def markdown(self) -> str:
        facts = [f'- {key}: {value}' for key, value in self.environment.items()]
        facts.append('- options: ' + ', '.join(f'{key}={value}' for key, value in self.config.items()))
        return '\n'.join([f'# {self.name}', '', *facts, '', '\n\n'.join(table.markdown() for table in self.tables), ''])


def environment() -> dict[str, Any]:
    """Date, hardware and versions."""
    found: dict[str, Any] = {
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'cpu': _cpu_model(),
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'threads': torch.get_num_threads(),
        'memory_gib': round(psutil.virtual_memory().total / 2**30, 1),
        'load': round(os.getloadavg()[0], 2),
        'python': platform.python_version(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found['gpu'] = f'{properties.name}, {properties.total_memory / 2**30:.0f} GiB'
        found['cuda'] = torch.version.cuda  # pyright: ignore[reportAttributeAccessIssue]
        found['cudnn'] = torch.backends.cudnn.version()
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = 'not installed'
    found['commit'] = _commit()
    return found


def _cpu_model() -> str:
    info = Path('/proc/cpuinfo')
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    root = Path(__file__).resolve().parents[1]
    try:
        commit = subprocess.run(
            ['git', '-C', str(root), 'rev-parse', '--short=12', 'HEAD'], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ['git', '-C', str(root), 'status', '--porcelain', '--untracked-files=no', '--', 'composer_sam'],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    return commit + (' with local changes in composer_sam' if changed else '')


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value).replace('|', '\\|').replace('\n', ' ')
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f'{value:.4g}' if abs(value) < 1e4 else f'{value:.0f}'
    return f'{value:.3g}'

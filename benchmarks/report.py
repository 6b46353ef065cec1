"""The report of a benchmark: environment, options and tables, printed and written as JSON and Markdown.

A report is measured case by case, and every finished case is stored, so that an interrupted benchmark continues with
the next one. Stored cases are used only while machine, versions, options and code are the same.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from composer_sam import markdown
from composer_sam.files import write_whole

__all__ = ['RESULTS', 'WORK', 'Report', 'Table', 'code', 'environment']

RESULTS = Path(__file__).resolve().parent / 'results'
WORK = Path(__file__).resolve().parent / '.work'  # finished cases and runs, not committed
_PACKAGES = ('torch', 'torchvision', 'mosaicml', 'pytorch_optimizer', 'numpy')


@dataclass
class Table:
    """A table of named columns. Numbers are shown in four significant digits, and are complete in the JSON.

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
        """Add a row."""
        if len(row) != len(self.columns):
            raise ValueError(f'the table {self.title!r} has {len(self.columns)} columns, got {len(row)} values')
        self.rows.append(row)

    def markdown(self) -> str:
        """Return the table in Markdown, below its title, with straight columns."""
        rows = [[_shown(value) for value in row] for row in self.rows]
        table = markdown.table(self.columns, rows, aligned=True).rstrip('\n')
        return '\n'.join([f'### {self.title}', '', table, *(['', self.note] if self.note else [])])


class Report:
    """Collects tables, prints each when it is added, and writes all of them.

    Args:
        name: the name of the benchmark and of its files.
        config: every option of the run; ``json``, the path of the report, is left out.
        out: the path of the report without its suffixes ``.json`` and ``.md``; ``benchmarks/results/NAME`` if None.
    """

    def __init__(self, name: str, config: dict[str, Any], out: str | Path | None = None):
        self.name = name
        self.config = {key: value for key, value in config.items() if key != 'json'}
        self.environment = environment()
        self.tables: list[Table] = []
        self._out = Path(out) if out else RESULTS / name
        self._kept = _Kept(WORK / f'{self._out.name}.json', {'config': self.config, **_identity(self.environment)})

    def case(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the result of ``measure()``, from an earlier, interrupted run if it is stored.

        Args:
            key: the name of the case, unique in the report.
            measure: takes the measurement and returns JSON's own types.
        """
        if (kept := self._kept.get(key)) is not None:
            print(f'{self.name}: {key}: kept from {kept["date"]}', flush=True)
        else:
            print(f'{self.name}: {key} ...', flush=True)
            kept = {'date': _now(), 'load': round(os.getloadavg()[0], 2)}
            began = time.perf_counter()
            kept['found'] = measure()
            kept['seconds'] = round(time.perf_counter() - began, 1)
            kept = self._kept.keep(key, kept)
        measured = self.environment.setdefault('cases', {})
        measured[key] = {name: kept[name] for name in ('date', 'load', 'seconds')}
        return kept['found']

    def add(self, table: Table) -> None:
        """Add a table and print it."""
        self.tables.append(table)
        print(f'\n{table.markdown()}', flush=True)

    def write(self) -> Path:
        """Write the JSON and the Markdown file, and return the path of the latter."""
        self._out.parent.mkdir(parents=True, exist_ok=True)
        content = {
            'name': self.name,
            'environment': self.environment,
            'config': self.config,
            'tables': [asdict(table) for table in self.tables],
        }
        return write_report(self._out.with_name(self._out.name + '.json'), content)


def write_report(path: Path, content: dict[str, Any]) -> Path:
    """Write a report's JSON to ``path`` and its Markdown beside it, and return the path of the latter."""
    written = json.dumps(content, indent=1, default=str)
    write_whole(path, written + '\n')
    readable = path.with_suffix('.md')
    write_whole(readable, _markdown(json.loads(written)))
    print(f'\nwritten to {readable} and {path.name}', flush=True)
    return readable


def _markdown(content: dict[str, Any]) -> str:
    """Return a report in Markdown: environment, options and tables."""
    facts = [f'- {key}: {value}' for key, value in content['environment'].items() if key != 'cases']
    if cases := content['environment'].get('cases'):
        facts.append(
            '- cases (seconds each, load of the machine before): '
            + '; '.join(f'{key} ({case["seconds"]}, {case["load"]})' for key, case in cases.items())
        )
    facts.append('- options: ' + ', '.join(f'{key}={value}' for key, value in content['config'].items()))
    tables = '\n\n'.join(Table(**table).markdown() for table in content['tables'])
    return '\n'.join([f'# {content["name"]}', '', *facts, '', tables, ''])


class _Kept:
    """The finished cases and their file, which holds cases of one machine, one set of options and one state of the
    code only."""

    def __init__(self, file: Path, identity: dict[str, Any]):
        self._file = file
        self._content: dict[str, Any] = {'identity': json.loads(json.dumps(identity, default=str)), 'cases': {}}
        if file.exists():
            found = json.loads(file.read_text())
            if found['identity'] == self._content['identity']:
                self._content = found

    def get(self, key: str) -> dict[str, Any] | None:
        return self._content['cases'].get(key)

    def keep(self, key: str, case: dict[str, Any]) -> dict[str, Any]:
        self._content['cases'][key] = case
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._file, json.dumps(self._content, indent=1))
        return json.loads(json.dumps(case))  # as it will be read, tuples as lists


def code() -> str:
    """Return a short hash of all code that a measurement depends on: the package's and the benchmarks'."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted([*(root / 'composer_sam').rglob('*.py'), *(root / 'benchmarks').glob('*.py')]):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def environment() -> dict[str, Any]:
    """Return date, hardware and versions."""
    found: dict[str, Any] = {
        'date': _now(),
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


def _identity(environment: dict[str, Any]) -> dict[str, Any]:
    """Return everything in which a stored case must agree with the run that uses it."""
    return {'code': code(), **{k: v for k, v in environment.items() if k not in ('date', 'load', 'commit')}}


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')


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
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f'{value:.4g}' if abs(value) < 1e4 else f'{value:.0f}'
    return f'{value:.3g}'

"""Write the figures of the docs from the committed reports and by arithmetic, between marks such as

    <!-- figures: results -->
    <!-- end of figures -->

so that no figure is typed by hand. A test checks that the files are up to date.

    python -m benchmarks.readme
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS
from benchmarks.scale import memory_tables, steps_table
from benchmarks.thrift_tables import NONE, REMEDIES_BESIDE, SHARES, SHARES_COLUMNS, verdict
from composer_sam.files import write_whole
from composer_sam.markdown import table

__all__ = ['FILES', 'filled', 'main']

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
FILES = (
    ROOT / 'README.md',
    DOCS / 'benchmarks.md',
    DOCS / 'choosing.md',
    DOCS / 'language_models.md',
    DOCS / 'scale.md',
    *(file for file in sorted((DOCS / 'methods').glob('*.md')) if file.name != 'index.md'),
)
_MARKED = re.compile(r'(<!-- figures: (\w+)(?: (\w+))? -->\n).*?(<!-- end of figures -->)', re.DOTALL)
_THROUGH = "Whole steps through Composer's Trainer"
_CHEAP = 'Whole steps of methods that take less than two passes'
_MEMORY = 'Memory beyond the base optimizer'
MODELS = {'resnet18': 'ResNet-18', 'vit': 'ViT', 'mlp': 'MLP'}

Row = dict[str, Any]


class Figures:
    """The tables of a report, found by their titles, and their rows, found by the values of their columns."""

    def __init__(self, name: str):
        self._name = name
        self._tables = json.loads((RESULTS / f'{name}.json').read_text())['tables']

    def rows(self, title: str, **wanted: Any) -> list[Row]:
        """Return the rows whose columns have the wanted values, of the table whose title begins so."""
        table = next((t for t in self._tables if t['title'].startswith(title)), None)
        if table is None:
            raise KeyError(f'the report {self._name} has no table {title!r}')
        rows = [dict(zip(table['columns'], row, strict=True)) for row in table['rows']]
        return [row for row in rows if all(row[key] == value for key, value in wanted.items())]

    def row(self, title: str, **wanted: Any) -> Row:
        """Return the only row with the wanted values."""
        (found,) = self.rows(title, **wanted)
        return found


def link(name: str, folder: str = '..') -> str:
    """Return a link to a report, from a page whose folder is so far below the repository's root."""
    return f'[{name}]({folder}/benchmarks/results/{name}.md)'


def results() -> str:
    """Return the table of docs/benchmarks.md: steps, memory, traffic and accuracy, beside those of other packages."""
    rows = [*_steps(), *_cheap_steps(), *_optimizer_side(), *_memory(), *_traffic(), *_curvature(), *_gpu(), *_worth()]
    return table(('what', 'composer_sam', 'beside it', 'report'), rows)


def accuracies() -> str:
    """Return the table of docs/choosing.md with every method on every task."""
    rows = []
    for row in _tested():
        if not row['knob']:
            rows.append(
                (
                    *(row['task'], row['variant'], _accuracy(row), f'{row["cost"]:.2f}x'),
                    *(_gain(row, 'gain at equal epochs', '± 95%'), _gain(row, 'gain at equal compute', '± 95% there')),
                )
            )
    return table(('task', 'variant', 'accuracy', 'cost', 'gain at equal epochs', 'gain at equal compute'), rows)


def intervals() -> str:
    """Return the table of docs/choosing.md with accuracy and cost by interval."""
    rows = []
    for row in _tested():
        turned = any(r['knob'] for r in _tested() if r['task'] == row['task'])
        if turned and row['method'] == 'SAM':
            gain = _gain(row, 'gain at equal epochs', '± 95%')
            rows.append((row['task'], row['variant'], row['knob'] or '-', f'{row["cost"]:.2f}x', _accuracy(row), gain))
    return table(('task', 'variant', 'rho', 'cost', 'accuracy', 'gain at equal epochs'), rows)


def radii() -> str:
    """Return the table of docs/choosing.md with the arguments chosen on the validation split."""
    found = Figures('quality').rows('Chosen on a validation split', chosen=True)
    return table(
        ('task', 'chosen', 'accuracy there'), [(r['task'], r['candidate'], f'{r["accuracy"]:.1f} %') for r in found]
    )


def _steps() -> Iterator[Sequence[str]]:
    figures = Figures('step_time')
    plain = 'Whole steps in a plain loop'

    def ratios(title: str, setting: str, variant: str) -> str:
        found = {m: figures.rows(title, model=m, setting=setting, variant=variant) for m in MODELS}
        return ', '.join(_ratio(row) for rows in found.values() for row in rows)

    def line(what: str, setting: str, variant: str, peer: str = '', title: str = _THROUGH) -> Sequence[str]:
        limit = figures.row(title, model='mlp', setting=setting, variant=variant)['limit']
        beside = f'{peer.partition(",")[0]}: {ratios(title, setting, peer)}' if peer else ''
        what = f'{what}, x the base step (limit {limit:.2f}x)'
        return what, ratios(title, setting, variant), beside, link('step_time')

    yield line('SAM step', 'trainer', 'SAM', "Composer's SAM")
    yield line('the same, `interval=10`', 'trainer', 'SAM, interval 10', "Composer's SAM, interval 10")
    yield line('the same, compiled', 'compile', 'SAM', "Composer's SAM")
    yield line('the same, two processes (DDP)', 'ddp', 'SAM', "Composer's SAM")
    yield line("the same, with the C library's own allocator", 'default', 'SAM', "Composer's SAM")
    yield line('the same, two calls in a plain loop', 'plain', 'SAM, two calls', "pytorch_optimizer's SAM", plain)
    yield line('WSAM step', 'trainer', 'WSAM')
    yield line('GAM step', 'trainer', 'GAM')
    yield line('a second base run: the noise', 'trainer', 'base again')


def _ratio(row: Row) -> str:
    if row['x base'] is None:
        raise SystemExit(f'{row["variant"]} was not measured: install the extra benchmarks, and measure again')
    return f'{MODELS[row["model"]]} {row["x base"]:.2f}x ± {row["± x"]:.2f}'


def _cheap_steps() -> Iterator[Sequence[str]]:
    figures = Figures('cheap_steps')
    for variant in ('MSAM', 'LookSAM, k=5', 'SAM, ascent_fraction=0.25'):
        rows = {m: figures.row(_CHEAP, model=m, setting='trainer', variant=variant) for m in MODELS}
        found = ', '.join(_ratio(row) for row in rows.values())
        limit = rows['mlp']['limit']
        yield f'{variant}, x the base step (its passes: {limit:.2f}x)', found, '', link('cheap_steps')


def _optimizer_side() -> Iterator[Sequence[str]]:
    figures = Figures('optimizer_overhead')
    for model, name in {'resnet18': 'ResNet-18', 'vit_b_16': 'ViT-B/16'}.items():
        found = {row['variant']: row for row in figures.rows('Models', model=model, allocator='default', base='SGD')}

        def ms(variant: str, found: dict[str, Row] = found) -> str:
            return f'{found[variant]["µs beyond the passes"] / 1e3:.1f} ms'

        beside = ', '.join(f'{peer} {ms(peer)}' for peer in ("Composer's SAM", "pytorch_optimizer's SAM"))
        floor = found['SAM']['x memory floor']
        yield (
            f'optimizer side of a SAM step, {name}',
            f'{ms("SAM")}, {floor:.1f}x the memory floor',
            beside,
            link('optimizer_overhead'),
        )


def _memory() -> Iterator[Sequence[str]]:
    rows = Figures('memory').rows(_MEMORY, model='resnet18', base='SGD')
    found = {row['variant']: row for row in rows}

    def copies(variant: str) -> str:
        return f'{found[variant]["held between steps"]:.1f} / {found[variant]["at the peak"]:.1f}'

    peers = [name for name in ("Composer's SAM", "pytorch_optimizer's SAM") if name in found]
    for method in ('SAM', 'WSAM', 'GAM'):
        beside = ', '.join(f'{peer} {copies(peer)}' for peer in peers) if method == 'SAM' else ''
        what = f'memory of {method}, held between steps / at the peak, in copies of the parameters'
        yield what, copies(method), beside, link('memory')


def _traffic() -> Iterator[Sequence[str]]:
    rows = Figures('scaling').rows('What a step asks of the ranks')
    found = {row['variant']: row for row in rows}
    yield (
        'gradients averaged over ranks in a step under DDP',
        ', '.join(f'{name} {_averaged(found[name]):g}' for name in ('SAM', 'GAM', 'WSAM')),
        f'SGD {_averaged(found["SGD"]):g}',
        link('scaling'),
    )


def _averaged(row: Row) -> float:
    return row['averaged by DDP G'] + row['by the method M']


def _curvature() -> Iterator[Sequence[str]]:
    for row in Figures('diagnostics').rows('The largest eigenvalue of the Hessian'):
        what = f'largest Hessian eigenvalue, {row["model"]}, {row["samples"]} samples'
        beside = f'{row["x"]:.1f}x the peak memory of a training step'
        yield what, f'{row["s in all"]:.0f} s', beside, link('diagnostics')


def _gpu() -> Iterator[Sequence[str]]:
    found = {
        row['variant']: row for row in Figures('gpu-h200').rows("Step time through Composer's Trainer", batch=1024)
    }
    for interval in ('', ', interval 10'):
        yield (
            f'SAM{interval}, CIFAR ResNet-18, one H200, bf16, batch 1024; an earlier version',
            f'{found[f"SAM{interval}"]["x base"]:.2f}x',
            f"""Composer's SAM {found[f"Composer's SAM{interval}"]['x base']:.2f}x""",
            link('gpu-h200'),
        )


def _worth() -> Iterator[Sequence[str]]:
    for row in _tested():
        if row['method'] == 'SAM' and not row['knob']:
            equal, fair = (
                _gain(row, 'gain at equal epochs', '± 95%'),
                _gain(row, 'gain at equal compute', '± 95% there'),
            )
            yield (
                f'accuracy, {row["task"]}',
                f'{row["variant"]}: {_accuracy(row)}, gain {equal} points at equal epochs, {fair} at equal compute',
                f'SGD: {_accuracy(_plain(row["task"]))}',
                link('quality'),
            )


def _tested() -> list[Row]:
    return Figures('quality').rows('Accuracy at equal epochs and at equal compute')


def _plain(task: str) -> Row:
    return next(row for row in _tested() if row['task'] == task and row['variant'] == 'SGD')


def _accuracy(row: Row) -> str:
    return f'{row["accuracy"]:.1f} ± {row["±"]:.1f} %'


def _gain(row: Row, gain: str, half: str) -> str:
    return f'{row[gain]:+.1f} ± {row[half]:.1f}'


def thrift() -> str:
    """Return the table of docs/choosing.md with the share of SAM's gain that every cheaper setting keeps."""
    rows = Figures('thrift').rows(SHARES)
    tasks = [column for column in rows[0] if column not in SHARES_COLUMNS]
    found = []
    for row in rows:
        shares = [row[task] if row[task] == NONE else f'{row[task]:.0f} %' for task in tasks]
        found.append(
            (*(row['variant'], f'{row["passes"]:.2f}', f'{row["smallest share"]:.0f} %', row['goal'], *shares),)
        )
    columns = ('SAM, or a method', 'passes', 'smallest share', 'goal', *tasks)
    return f'{verdict(rows)}\n\n{table(columns, found)}'


def remedies() -> str:
    """Return the table of docs/choosing.md with what is left of SAM's gain beside cheap remedies."""
    rows = Figures('thrift').rows(REMEDIES_BESIDE)
    found = [
        (
            *(row['task'], row['remedy'], f'{row["SGD with it"]:.1f} ± {row["±"]:.1f} %'),
            *(_gain(row, 'gain of the remedy', '± 95%'), f'{row["SAM with it"]:.1f} ± {row["± of SAM"]:.1f} %'),
            _gain(row, 'gain of SAM beside it', '± 95% of SAM'),
        )
        for row in rows
    ]
    columns = ('task', 'remedy', 'SGD with it', 'gain of the remedy', 'SAM with it', 'gain of SAM beside it')
    return table(columns, found)


def method(name: str) -> str:
    """Return the table of a method's page with what our reports have measured of it."""
    rows = [*_time_of(name), *_memory_of(name)]
    return table(('measured', 'here', 'report'), rows)


def _time_of(name: str) -> Iterator[Sequence[str]]:
    for report, title in (('step_time', _THROUGH), ('cheap_steps', _CHEAP)):
        rows = [row for row in Figures(report).rows(title, setting='trainer') if row['variant'].split(',')[0] == name]
        for variant in dict.fromkeys(row['variant'] for row in rows):
            if report == 'cheap_steps' and variant in ('SAM', 'SAM, interval=5'):
                continue  # step_time has them
            found = ', '.join(_ratio(row) for row in rows if row['variant'] == variant)
            yield f'time of a step of {variant}, x the base step', found, link(report, '../..')


def _memory_of(name: str) -> Iterator[Sequence[str]]:
    row = Figures('memory').row(_MEMORY, model='resnet18', base='SGD', variant=name)
    what = 'memory held between steps / added at the peak, ResNet-18, in copies of the parameters'
    yield what, f'{row["held between steps"]:.1f} / {row["at the peak"]:.1f}', link('memory', '../..')


def survival() -> str:
    """Return the table of docs/language_models.md: what small networks lose, by how they were trained."""
    figures = Figures('survival')
    times = {row['recipe']: row["of AdamW's time"] for row in figures.rows('Time of training')}
    equal = {row['']: row for row in figures.rows('At equal learning')}
    rows = []
    for row in figures.rows('Loss on the first text'):
        name, after = row[''], equal[row['']]
        damages = (row['lost: 4 bits'], row['lost: 3 bits'], row['lost: noise 0.2'])
        rows.append((name, f'{times[name]:.2f}x', row['loss'], *damages, after['lost'], after['first text']))
    headings = ('loss', '4 bits lose', '3 bits lose', 'noise 0.2 loses', 'fine-tuning loses', 'loss after it')
    return table(('', 'time', *headings), rows)


def five() -> str:
    """Return README's table: what it brings, and what it costs in time and memory."""
    rows = []
    for task in ('digits, 40% wrong labels', 'CIFAR-10, 2,000 images, 20% wrong labels'):
        sam = next(r for r in _tested() if r['task'] == task and r['method'] == 'SAM' and not r['knob'])
        what = f'accuracy, {task}, equal epochs'
        rows.append((what, _accuracy(sam), f'SGD {_accuracy(_plain(task))}', link('quality', '.')))
    steps, cheap, memory = Figures('step_time'), Figures('cheap_steps'), Figures('memory')

    def times(who: str) -> str:
        every, tenth = (
            steps.row(_THROUGH, model='resnet18', setting='trainer', variant=variant)['x base']
            for variant in (who, f'{who}, interval 10')
        )
        return f'{every:.2f}x, {tenth:.2f}x'

    def copies(who: str) -> str:
        row = memory.row(_MEMORY, model='resnet18', base='SGD', variant=who)
        return f'{row["held between steps"]:.1f}, {row["at the peak"]:.1f}'

    peer = "Composer's SAM"
    what = 'time of a step, ResNet-18: every step perturbed, every tenth'
    rows.append((what, f'{times("SAM")} that of SGD', f'{peer} {times(peer)}', link('step_time', '.')))
    what = 'the same, perturbed by a quarter of the batch (`ascent_fraction=0.25`)'
    quarter = cheap.row(_CHEAP, model='resnet18', setting='trainer', variant='SAM, ascent_fraction=0.25')
    rows.append((what, f'{quarter["x base"]:.2f}x', '', link('cheap_steps', '.')))
    what = 'memory between steps, and at the peak, in copies of the weights'
    rows.append((what, copies('SAM'), f'{peer} {copies(peer)}', link('memory', '.')))
    return table(('what', 'SAM here', 'beside it', 'report'), rows)


FIGURES: dict[str, Callable[..., str]] = {
    'five': five,
    'results': results,
    'accuracies': accuracies,
    'intervals': intervals,
    'radii': radii,
    'thrift': thrift,
    'remedies': remedies,
    'scale': memory_tables,
    'survival': survival,
    'scale_steps': steps_table,
    'method': method,
}


def filled(text: str) -> str:
    """Return the text with the figures of the current reports between its marks."""
    return _MARKED.sub(lambda found: f'{found[1]}{FIGURES[found[2]](*filter(None, (found[3],)))}{found[4]}', text)


def main() -> None:
    for file in FILES:
        text = file.read_text()
        if (new := filled(text)) != text:
            write_whole(file, new)
            print(f'written to {file.relative_to(ROOT)}')


if __name__ == '__main__':
    main()

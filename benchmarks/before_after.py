"""What a change has brought: the optimizer's side of SAM's step in an earlier report, beside the current one.

The table is added to the current report. Ratios are to Composer's SAM, measured in the same run; microseconds of two
runs compare two states of the machine as well.

    git show REVISION:benchmarks/results/optimizer_overhead.json > /tmp/before.json
    python -m benchmarks.before_after /tmp/before.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, Table, write_report

REPORT = RESULTS / 'optimizer_overhead.json'
TITLE = 'Before and after'
_RATIO, _TIME, _FLOOR = "x Composer's SAM", 'µs beyond the passes', 'x memory floor'


def compared(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """Return the table of the cases of SAM that both reports have."""
    earlier, current = _cases(before), _cases(after)
    note = (
        f'SAM, beyond its passes and the base step. Before: commit {before["environment"]["commit"]}, of '
        f'{before["environment"]["date"][:10]}.'
    )
    columns = ('case', 'before: µs', _RATIO, _FLOOR, 'after: µs', f'{_RATIO}, after', f'{_FLOOR}, after')
    table = Table(TITLE, columns, note=note)
    for case, row in current.items():
        if case in earlier:
            old = earlier[case]
            table.add(case, old[_TIME], old[_RATIO], old[_FLOOR], row[_TIME], row[_RATIO], row[_FLOOR])
    return table


def _cases(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for table in report['tables']:
        if table['title'] == TITLE:
            continue
        for values in table['rows']:
            row = dict(zip(table['columns'], values, strict=True))
            if row['variant'] == 'SAM':
                synthetic = 'tensors' in row
                name = f'{row["tensors"]} tensors, {row["parameters"]:.0e} parameters' if synthetic else row['model']
                found[name if synthetic else f'{name}, {row["allocator"]} allocator'] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('before', type=Path, help='the JSON file of an earlier report')
    options = parser.parse_args()
    report = json.loads(REPORT.read_text())
    table = compared(json.loads(options.before.read_text()), report)
    report['tables'] = [t for t in report['tables'] if t['title'] != TITLE]
    report['tables'].append(asdict(table))
    print(table.markdown())
    write_report(REPORT, report)


if __name__ == '__main__':
    main()

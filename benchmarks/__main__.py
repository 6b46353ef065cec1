"""Run all benchmarks one after the other, and update the figures of README and docs.

    python -m benchmarks                        # the CPU set: an hour on two idle cores
    python -m benchmarks --images DIR           # CIFAR-10 from an image folder instead of torchvision's download
    python -m benchmarks --set long             # the slow set: curvature of ResNet-18
    python -m benchmarks --set thrift           # SAM's cheaper settings beside SAM: 90 minutes on two idle cores
    python -m benchmarks --set lm               # what language models lose after training: an hour on two idle cores
    python -m benchmarks --only memory scaling

Finished cases are stored in benchmarks/.work, so that the same command continues an interrupted run. A case is measured
again after a change of the code, of a version or of the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import RESULTS

SETS = {
    'cpu': ('step_time', 'cheap_steps', 'optimizer_overhead', 'memory', 'scaling', 'quality', 'pareto'),
    'long': ('diagnostics',),
    'thrift': ('thrift', 'thrift_picture'),
    'lm': ('survival',),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--set', choices=SETS, default='cpu')
    parser.add_argument('--only', nargs='+', choices=[name for names in SETS.values() for name in names])
    parser.add_argument('--images', type=Path, metavar='DIR', help='CIFAR-10 as an image folder')
    options = parser.parse_args()
    if options.images is not None and not options.images.is_dir():
        parser.error(f'--images: {options.images} is no directory')
    began = time.perf_counter()
    for name in options.only or SETS[options.set]:
        arguments = ['--images', str(options.images)] if name in ('quality', 'thrift') and options.images else []
        started = time.perf_counter()
        print(f'--- {name}', flush=True)
        subprocess.run([sys.executable, '-m', f'benchmarks.{name}', *arguments], check=True)
        minutes, total = (time.perf_counter() - started) / 60, (time.perf_counter() - began) / 60
        print(f'--- {name}: {minutes:.1f} min, {total:.1f} min in all', flush=True)
    subprocess.run([sys.executable, '-m', 'benchmarks.readme'], check=True)
    print(f'reports in {RESULTS}')


if __name__ == '__main__':
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f'{error.cmd[2]} failed; finished cases are stored, and the same command continues the run')
    except KeyboardInterrupt:
        sys.exit('interrupted; finished cases are stored, and the same command continues the run')

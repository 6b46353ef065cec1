"""Time and memory of the largest eigenvalue of the Hessian, compared with a training step.

The training step is a forward, a backward and a step of SGD with momentum on one batch; the Hessian is that of all
samples in micro-batches, at the weights those steps end with. Each is a process of its own, whose peak of resident
memory is taken beyond what model, data and libraries take: NumPy's vectors count too.

    python -m benchmarks.diagnostics
    python -m benchmarks.diagnostics --models mlp
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from benchmarks.measure import median
from benchmarks.report import Report, Table
from benchmarks.workloads import cifar_resnet18, digits_mlp
from composer_sam.diagnostics import Objective, top_eigenvalues

COLUMNS = (
    *('model', 'samples', 'batch', 'micro-batch', 'eigenvalue', 'residual', 'products'),
    *('s in all', 'ms per product', 'ms per step', 'x product / steps on the same samples'),
    *('peak MiB', 'peak MiB of a step', 'x'),
)
NOTE = (
    'The largest eigenvalue to tol=1e-3. "x product / steps": a Hessian product over all samples, divided by the '
    'training steps that see as many samples. "x": the peak of memory of the eigenvalue by that of a training step.'
)
_STEPS = 20


def _digits(samples: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels[:samples], dtype=torch.float32) / 16, torch.tensor(labels[:samples])


def _images(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, 32, 32, generator=generator)
    return images, torch.randint(10, (samples,), generator=generator)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]], int]] = {
    'mlp': (digits_mlp, _digits, 1437),
    'resnet18': (cifar_resnet18, _images, 512),
}


def measured(case: str, model: str, batch: int, microbatch: int | None, weights: str) -> dict[str, float]:
    """Measure one case in this process."""
    build, data, samples = MODELS[model]
    torch.manual_seed(0)
    net, (inputs, labels) = build(), data(samples)
    loss = nn.functional.cross_entropy
    batches = list(zip(inputs.split(batch), labels.split(batch), strict=True))
    if case == 'eigenvalue':
        net.load_state_dict(torch.load(weights))
    before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    if case == 'step':
        found = {'step': median(_trained(net, loss, batches[: samples // batch]))}
        torch.save(net.state_dict(), weights)
    else:
        top = top_eigenvalues(Objective(net, loss, batches, microbatch=microbatch))
        found = {'products': top.products, 'value': top.values[0], 'residual': top.residuals[0]}
    seconds = time.perf_counter() - began
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {**found, 'seconds': seconds, 'peak': peak / 2**20}


def _trained(net: nn.Module, loss: Any, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Return the seconds of every step but the first few."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    seconds = []
    for index in range(_STEPS):
        x, y = batches[index % len(batches)]
        began = time.perf_counter()
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return seconds[3:]


def row(model: str, batch: int, microbatch: int | None, folder: str) -> tuple[Any, ...]:
    """Return a row of the report, measured in new processes."""

    def run(case: str) -> dict[str, float]:
        given = {'case': case, 'model': model, 'batch': batch, 'microbatch': microbatch, 'weights': f'{folder}/{model}'}
        command = [sys.executable, '-m', 'benchmarks.diagnostics', '--case', json.dumps(given)]
        return json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )

    step, eigenvalue = run('step'), run('eigenvalue')
    samples = MODELS[model][2]
    product = eigenvalue['seconds'] / eigenvalue['products']
    return (
        *(model, samples, batch, microbatch or batch, eigenvalue['value'], eigenvalue['residual']),
        *(int(eigenvalue['products']), eigenvalue['seconds'], 1e3 * product, 1e3 * step['step']),
        *(product / (step['step'] * samples / batch), eigenvalue['peak'], step['peak']),
        eigenvalue['peak'] / step['peak'],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=list(MODELS), choices=list(MODELS))
    parser.add_argument('--batch', type=int, default=128, help='of the training step')
    parser.add_argument('--microbatch', type=int, help='of the Hessian product (default: the batch)')
    parser.add_argument('--case', help=argparse.SUPPRESS)
    parser.add_argument('--json', metavar='OUT', help='write the report here instead of benchmarks/results/')
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(**json.loads(options.case))))
        return
    report = Report(
        'diagnostics', {name: value for name, value in vars(options).items() if name != 'case'}, options.json
    )
    table = Table('The largest eigenvalue of the Hessian', COLUMNS, note=NOTE)
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            table.add(*row(model, options.batch, options.microbatch, folder))
    report.add(table)
    report.write()


if __name__ == '__main__':
    main()

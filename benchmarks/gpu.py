"""Check correctness and measure cost on a machine with a GPU, in one command.

It runs in under eight minutes and writes one report. A section that fails is reported with its error, and the others
run.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --sections time memory --data path/to/images
"""

from __future__ import annotations

import argparse
import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.algorithms import SAM as ComposerSAM
from composer.algorithms import ChannelsLast

from benchmarks.gpu_checks import check_compile, check_graphs, check_oom
from benchmarks.measure import median, ratios, spread
from benchmarks.memory import COLUMNS as MEMORY_COLUMNS
from benchmarks.memory import NOTE as MEMORY_NOTE
from benchmarks.memory import memory_rows
from benchmarks.optimizer_overhead import COLUMNS as OVERHEAD_COLUMNS
from benchmarks.optimizer_overhead import NOTE as OVERHEAD_NOTE
from benchmarks.optimizer_overhead import overhead_rows, torchvision_model
from benchmarks.optimizer_variants import METHODS
from benchmarks.report import Report, Table
from benchmarks.workloads import Batches, Clock, make_trainer, network
from composer_sam import SAM

PRECISIONS = (('fp32', False), ('amp_bf16', False), ('amp_bf16', True))


def train(options: argparse.Namespace, device: torch.device) -> Table:
    """(a) SAM trains in every precision; at lr 0 the weights come back bit for bit, the statistics as plain SGD's."""
    columns = (
        'precision', 'channels_last', 'steps', 'first loss', 'last loss', 'finite', 'ms per step',
        'weights equal at lr 0', 'BatchNorm as base at lr 0',
    )  # fmt: skip
    table = Table('Training ResNet-18 (32x32) with SAM', columns)
    size = 256 if device.type == 'cuda' else 8
    batches = _batches(options.data, size, 8, device)
    steps = 40 if device.type == 'cuda' else 4
    for precision, channels_last in PRECISIONS if device.type == 'cuda' else (('fp32', False), ('fp32', True)):
        layout: dict[str, Any] = {'precision': precision, 'device': device}

        def trainer(lr: float, algorithm: Any, layout: Any = layout, channels_last: bool = channels_last) -> Any:
            clock = Clock(device)
            algorithms = [*([ChannelsLast()] if channels_last else []), *([algorithm] if algorithm else [])]
            torch.manual_seed(0)
            return make_trainer(network(device), batches, algorithms, lr, callbacks=[clock], **layout), clock

        fitted, clock = trainer(0.05, SAM(rho=0.05))
        fitted.fit(duration=f'{steps}ba')
        losses = clock.losses
        finite = all(math.isfinite(loss) for loss in losses) and all(
            bool(p.isfinite().all()) for p in fitted.state.model.parameters()
        )
        torch.backends.cudnn.deterministic = True
        ended = {}
        for name, algorithm in (('ours', SAM(rho=0.05)), ('base', None)):
            still, _ = trainer(0.0, algorithm)
            before = [p.detach().clone() for p in still.state.model.parameters()]
            still.fit(duration='5ba')
            model = still.state.model
            equal = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
            ended[name] = equal, [buffer.clone() for buffer in model.buffers()]
        torch.backends.cudnn.deterministic = False
        statistics = all(torch.equal(a, b) for a, b in zip(ended['ours'][1], ended['base'][1], strict=True))
        pace = 1e3 * median(clock.seconds[len(clock.seconds) // 2 :])
        table.add(
            precision, channels_last, len(losses), losses[0], losses[-1], finite, pace, ended['ours'][0], statistics
        )
    return table


def step_time(options: argparse.Namespace, device: torch.device) -> Table:
    """(b) Whole steps through the Trainer, interleaved in chunks of ten steps."""
    columns = ('batch', 'variant', 'ms per step', '±', 'x base')
    note = 'ResNet-18 (32x32), amp_bf16, channels_last; every sample is ten steps, so interval 10 perturbs once in it.'
    table = Table("Step time through Composer's Trainer", columns, note=note)
    on_gpu = device.type == 'cuda'
    for size in (128, 1024) if on_gpu else (4,):
        batches = _batches(None, size, 10, device)
        variants = {
            'base': None,
            'SAM': SAM(rho=0.05),
            'SAM, interval 10': SAM(rho=0.05, interval=10),
            "Composer's SAM": ComposerSAM(rho=0.05),
            "Composer's SAM, interval 10": ComposerSAM(rho=0.05, interval=10),
        }
        trainers = {}
        for name, algorithm in variants.items():
            clock = Clock(device, every_step=False)
            algorithms = [ChannelsLast(), *([] if algorithm is None else [algorithm])]
            options_ = {'precision': 'amp_bf16' if on_gpu else 'fp32', 'device': device, 'callbacks': [clock]}
            trainers[name] = make_trainer(network(device), batches, algorithms, **options_), clock
        names = list(trainers)
        rounds = options.rounds if on_gpu else 2
        for index in range(rounds + 1):
            for name in names[index % len(names) :] + names[: index % len(names)]:
                trainer, clock = trainers[name]
                clock.chunk(trainer, 10 if on_gpu else 2, counted=index > 0)
        base = trainers['base'][1].seconds
        for name in names:
            own = trainers[name][1].seconds
            ratio = median(ratios(own, base))
            table.add(size, name, 1e3 * median(own), 1e3 * spread(own), ratio)
    return table


def overhead(options: argparse.Namespace, device: torch.device) -> Table:
    """(c) The optimizer's part of a step of SAM, with both ways of moving the weights."""
    table = Table('Optimizer-side cost of a step', ('model', *OVERHEAD_COLUMNS), note=OVERHEAD_NOTE)
    on_gpu = device.type == 'cuda'
    for model in ('resnet18', 'vit_b_16') if on_gpu else ('resnet18',):
        for base in ('SGD', 'AdamW') if on_gpu else ('SGD',):
            net = torchvision_model(model).to(device)
            for row in overhead_rows(net, base, ['SAM'], ['default', 'copy', 'exchange'], device, 4 * options.rounds):
                table.add(model, *row)
    return table


def methods(options: argparse.Namespace, device: torch.device) -> Table:
    """(c) The optimizer's part of a step of every method."""
    table = Table('Optimizer-side cost of a step of every method', ('model', *OVERHEAD_COLUMNS), note=OVERHEAD_NOTE)
    model = 'vit_b_16' if device.type == 'cuda' else 'resnet18'
    net = torchvision_model(model).to(device)
    for row in overhead_rows(net, 'SGD', list(METHODS), ['default'], device, options.rounds):
        table.add(model, *row)
    return table


def memory(options: argparse.Namespace, device: torch.device) -> Table:
    """(d) Memory beyond the base optimizer: of every method, and of SAM with both ways of moving the weights."""
    del options
    table = Table('Memory beyond the base optimizer', MEMORY_COLUMNS, note=MEMORY_NOTE)
    for model in ('resnet18', 'vit_b_16') if device.type == 'cuda' else ('resnet18',):
        for row in (
            *memory_rows(model, 'SGD', list(METHODS), ['default'], device),
            *memory_rows(model, 'SGD', ['SAM'], ['copy', 'exchange'], device, peers=()),
        ):
            table.add(*row)
    return table


def graphs(options: argparse.Namespace, device: torch.device) -> Table:
    """(e) A captured CUDA graph as the closure gives the eager trajectory, for every method that can use one."""
    del options
    return check_graphs(device)


def compiled(options: argparse.Namespace, device: torch.device) -> Table:
    """(e) torch.compile gives the eager trajectory, compiles once and records its graphs once."""
    del options
    return check_compile(device)


def oom(options: argparse.Namespace, device: torch.device) -> Table:
    """(f) Out of memory in the second pass leaves no trace."""
    del options
    return check_oom(device)


SECTIONS: dict[str, Callable[[argparse.Namespace, torch.device], Table]] = {
    'train': train,
    'oom': oom,
    'graphs': graphs,
    'memory': memory,
    'overhead': overhead,
    'methods': methods,
    'time': step_time,
    'compile': compiled,
}


def _batches(data: str | None, size: int, count: int, device: torch.device) -> Batches:
    """Return synthetic images of CIFAR's shape, or the first images of an image folder or of an ``.npz`` of x and y."""
    batches = Batches(size, count, (3, 32, 32), device)
    if data is None:
        return batches
    images, labels = _read(Path(data), size * count)
    for index in range(count):
        part = slice(index * size, (index + 1) * size)
        batches[index] = images[part].to(device), labels[part].to(device)
    return batches


def _read(data: Path, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    if data.suffix == '.npz':
        arrays = list(np.load(data).values())
        pixels, labels = arrays[0][:wanted], arrays[1][:wanted]
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    else:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms.v2.functional import pil_to_tensor, resize

        folder = ImageFolder(str(data))
        order = np.random.default_rng(0).permutation(len(folder))[:wanted]
        pairs = [folder[int(index)] for index in order]
        images = torch.stack([resize(pil_to_tensor(image), [32, 32]).float() / 255 for image, _ in pairs])
        labels = np.array([label for _, label in pairs])
    if len(images) < wanted:
        raise ValueError(f'{data} holds {len(images)} images, {wanted} are needed')
    return (images - 0.5) / 0.25, torch.from_numpy(np.asarray(labels)).long() % 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sections', nargs='+', default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument('--data', metavar='NPZ_OR_DIR', help='images for the training section; synthetic by default')
    parser.add_argument('--rounds', type=int, default=12)
    parser.add_argument('--json', metavar='OUT', help='write the report here instead of benchmarks/results/')
    parser.add_argument('--device', default='cuda', help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == 'cuda' and not torch.cuda.is_available():
        print('no CUDA device is available: nothing to measure')
        return

    report = Report('gpu', vars(options), options.json)
    outcome = Table('Sections', ('section', 'outcome', 'seconds'))
    for name in options.sections:
        begin = time.perf_counter()
        try:
            report.add(SECTIONS[name](options, device))
            result = 'done'
        except Exception as error:
            traceback.print_exc()
            result = f'{type(error).__name__}: {str(error)[:300]}'
        outcome.add(name, result, time.perf_counter() - begin)
        report.write()  # so that finished sections are stored if a later one does not return
        if device.type == 'cuda':
            torch.cuda.empty_cache()
    report.add(outcome)
    report.write()


if __name__ == '__main__':
    main()

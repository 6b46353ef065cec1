"""Timing of variants that run interleaved in one process, in rounds of changing order."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ['Samples', 'interleaved', 'median', 'ratios', 'spread']


@dataclass
class Samples:
    """One variant's calls: ``seconds`` of wall time with the device drained, ``host`` until the call returned, and
    ``faults``, the memory pages the kernel had to supply."""

    seconds: list[float]
    host: list[float]
    faults: list[int]

    def beyond(self, floor: Samples) -> list[float]:
        """Return the seconds beyond ``floor`` by round, so that slow drifts of the machine cancel out."""
        return [a - b for a, b in zip(self.seconds, floor.seconds, strict=True)]


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warmup: int = 3,
) -> dict[str, Samples]:
    """Call every variant once a round, the first ``warmup`` rounds uncounted, each round starting with another one."""
    samples = {name: Samples([], [], []) for name in variants}
    names = list(variants)
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for index in range(warmup + rounds):
            for name in names[index % len(names) :] + names[: index % len(names)]:
                _drain(device)
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                begin = time.perf_counter()
                variants[name]()
                returned = time.perf_counter()
                _drain(device)
                end = time.perf_counter()
                if index >= warmup:
                    samples[name].seconds.append(end - begin)
                    samples[name].host.append(returned - begin)
                    samples[name].faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
    finally:
        if enabled:
            gc.enable()
    return samples


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratios(own: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return the ratios by round."""
    return [a / b for a, b in zip(own, base, strict=True)]


def spread(values: Sequence[float]) -> float:
    """Return half the distance between the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method='inclusive')
    return (high - low) / 2


def _drain(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)

"""The global random streams are put back to where they were read, whatever was drawn since."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from composer_sam.engine.streams import RandomStreams


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    np.random.mtrand.set_bit_generator(np.random.MT19937(0))


@pytest.mark.parametrize(
    'draw',
    [
        random.random,
        lambda: random.gauss(0, 1),
        np.random.rand,
        np.random.randn,  # draws two and keeps one: the second draw changes nothing but that
        lambda: np.random.bytes(4 * 624),  # as many as the state has words: its place in them is the same again
        lambda: torch.rand(()).item(),
        lambda: torch.randn(()).item(),
    ],
)
@pytest.mark.parametrize('before', [0, 1])
def test_streams_are_put_back(draw: Callable[[], object], before: int) -> None:
    streams = RandomStreams(set())
    for _ in range(before):
        draw()
    places = streams.read()
    expected = [draw() for _ in range(3)]
    for drawn in (3, 1, 2):
        streams.write(places)
        assert [draw() for _ in range(drawn)] == expected[:drawn]


def test_another_bit_generator_is_put_back_too() -> None:
    np.random.mtrand.set_bit_generator(np.random.PCG64(1))
    streams = RandomStreams(set())
    places = streams.read()
    expected = np.random.rand()
    streams.write(places)
    assert np.random.rand() == expected

"""The global random streams are put back to where they were read, whatever was drawn since."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from composer_sam import SAM, SharpnessAwareOptimizer
from composer_sam.engine.streams import RandomStreams, computing_on


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


@pytest.mark.parametrize('before', [0, 1])
@pytest.mark.parametrize(
    ('draw', 'stream'),
    [
        (random.random, 0),
        (lambda: random.gauss(0, 1), 0),
        (lambda: random.getrandbits(32 * 624), 0),  # as many as the state has words: the position is the same again
        (lambda: random.seed(1), 0),
        (np.random.rand, 1),
        (np.random.randn, 1),
        (lambda: np.random.bytes(4 * 624), 1),
        (lambda: np.random.seed(1), 1),
        (lambda: torch.rand(()).item(), 2),
        (lambda: torch.rand(624).sum().item(), 2),
        (lambda: torch.manual_seed(1), 2),
    ],
)
def test_a_stream_that_was_drawn_from_has_moved(draw: Callable[[], object], stream: int, before: int) -> None:
    """Also by what its state barely shows: the second of two normal numbers, or a whole round of the position."""
    for _ in range(before):
        random.gauss(0, 1)
        np.random.randn()
    streams = RandomStreams(set())
    places = streams.read()
    assert streams.moved(places) == []
    draw()
    assert streams.moved(places) == [stream]
    streams.write(places)
    assert streams.moved(places) == []


def test_the_stream_of_the_gpu_is_put_back_where_parameters_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU: its stream is a number that every draw moves."""
    place, drawn = [0], []

    def draw(module: torch.nn.Module, inputs: object, outputs: object) -> None:
        del module, inputs, outputs
        drawn.append(place[0])
        place[0] += 1

    cpu = frozenset({torch.device('cpu')})
    assert computing_on(cpu) == cpu
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 3)
    monkeypatch.setattr(torch.cuda, 'get_rng_state', lambda device: torch.tensor(place))
    monkeypatch.setattr(torch.cuda, 'set_rng_state', lambda state, device: place.__setitem__(0, int(state)))
    assert computing_on(cpu) == cpu | {torch.device('cuda', 3)}
    model = torch.nn.Linear(2, 1)
    model.register_forward_hook(draw)
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SAM(), model)
    for _ in range(2):
        for _ in optimizer.passes():
            optimizer.zero_grad()
            model(torch.ones(4, 2)).square().mean().backward()
    assert drawn == [0, 0, 1, 1]
    for _ in range(2):
        for call in (optimizer.first_step, optimizer.second_step):
            model(torch.ones(4, 2)).square().mean().backward()
            call(zero_grad=True)
    assert drawn[4:] == [2, 2, 3, 3]

"""What the benchmarks hold the methods against: complete for every method, and as the rules say."""

from __future__ import annotations

import pytest

from benchmarks import needs, optimizer_variants
from benchmarks.arithmetic import Size, ddp, sharded
from benchmarks.needs import Needs, Variant
from composer_sam import registry
from tests.problems import with_all_passes


def test_every_method_has_a_floor() -> None:
    assert optimizer_variants.METHODS.keys() >= registry.keys()
    assert optimizer_variants.NEEDS.keys() == optimizer_variants.METHODS.keys()
    for name, method in optimizer_variants.METHODS.items():
        assert optimizer_variants.NEEDS[name].copies <= method().extra_copies, name
    for peer in optimizer_variants.PEERS.values():
        assert peer.rule in optimizer_variants.NEEDS


def test_a_measured_step_takes_all_passes_or_one() -> None:
    for name, method in optimizer_variants.METHODS.items():
        wanted = 1 if name.endswith('one pass') else with_all_passes(name.split(',')[0]).passes
        assert method().fewest_passes == wanted, name


@pytest.mark.parametrize(
    ('name', 'asked'),
    [
        ('SGD', Needs(1, passes=1, reduced=1)),
        ('SAM', Needs(1, passes=2, reduced=1, sums=1, summed=1)),
        ('GSAM', Needs(1, passes=2, reduced=1, means=1, sums=2, summed=4)),
        ('USAM', Needs(1, passes=2, reduced=1)),
        ('MSAM', Needs(1, passes=1, reduced=1, sums=1, summed=1)),
        ('DPSAT', Needs(1, passes=1, reduced=1, sums=1, summed=1)),
        ('SAGM', Needs(1, passes=2, means=1, sums=1, summed=1)),
        # One step in five has two passes, a norm and two products; the others two norms in one sum.
        ('LookSAM', Needs(5, passes=6, reduced=5, means=1, sums=2 + 4, summed=3 + 4 * 2)),
        ('AESAM, all passes', Needs(1, passes=2, reduced=1, means=1, sums=2, summed=2, agreed=1)),
        ('AESAM, one pass', Needs(1, passes=1, means=1, sums=1, summed=1, agreed=1)),
        ('RandomSAM, all passes', Needs(1, passes=2, reduced=1, sums=1, summed=1)),
    ],
)
def test_what_a_step_asks_of_the_ranks(name: str, asked: Needs) -> None:
    assert needs.needs(Variant(name)) == asked


@pytest.mark.parametrize('name', needs.METHODS)
def test_an_interval_adds_plain_steps(name: str) -> None:
    every, third = needs.needs(Variant(name)), needs.needs(Variant(name, 3))
    assert third.steps == 3 * every.steps
    assert third.passes - every.passes == third.steps - every.steps
    assert (third.sums, third.summed) == (every.sums, every.summed) or name == 'SGDHess'


def test_numbers_agreed_on_are_a_collective_of_replicas_only() -> None:
    size, asked = Size(100, tensors=4, units=2, buckets=1), needs.needs(Variant('AESAM, one pass'))
    (found,) = ddp(asked, size, 2)
    assert (found.number, found.bytes) == (1 + 1, 4 * (100 + 4) + 4)
    assert {one.kind: one.number for one in sharded(asked, size, 2, 2)} == {
        'all_gather': 4,
        'reduce_scatter': 2,
        'all_reduce': 1,
    }

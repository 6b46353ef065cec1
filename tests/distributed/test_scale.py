"""The arithmetic of docs/scale.md: the collectives that ranks really do, and the bytes that they really hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from ranks import four_ranks, two_ranks

from benchmarks.collectives import counted
from benchmarks.needs import METHODS, Variant
from benchmarks.shards import LIMIT, as_predicted, measured, memory_of

SAM = Variant('SAM')
FRACTION = Variant('SAM', options=(('ascent_fraction', 0.25),))
QUICK = ('SGD', 'SAM', 'MSAM')


def _cases(variants: Iterable[Variant]) -> list[Any]:
    return [
        pytest.param(variant, marks=[] if str(variant) in QUICK else pytest.mark.slow, id=str(variant))
        for variant in variants
    ]


METHOD_CASES = _cases(variant for variant in map(Variant, METHODS) if variant.shardable)
CASES = _cases(
    [
        *(Variant('SGD'), SAM, Variant('SAM', 3), Variant('SAM', options=(('sync_first_pass', True),)), FRACTION),
        *map(Variant, ('MSAM', 'ASAM', 'FunctionalSAM', 'GSAM', 'LookSAM', 'GAM')),
    ]
)
every_case = pytest.mark.parametrize('variant', CASES)


def _assert_as_predicted(found: dict[str, Any]) -> None:
    assert found['counted'] == found['predicted']
    assert found['ranks alike']


@two_ranks
@every_case
def test_collectives_in_mixed_precision(variant: Variant) -> None:
    """Their number and bytes: units gathered in bf16, gradients reduced in fp32, in every pass."""
    _assert_as_predicted(counted('FSDP2, bf16', variant))


@two_ranks
@pytest.mark.parametrize('reduces_once', [False, True])
@pytest.mark.parametrize('variant', [Variant('SGD'), SAM, FRACTION], ids=str)
def test_collectives_of_micro_batches(variant: Variant, reduces_once: bool) -> None:
    _assert_as_predicted(counted('FSDP2, bf16', variant, 4, reduces_once))


@four_ranks
@pytest.mark.parametrize('strategy', ['FSDP1 hybrid, 2 shards', 'FSDP2 hybrid, 2 shards, fp16'])
@every_case
def test_collectives_of_hybrid_shards(variant: Variant, strategy: str) -> None:
    _assert_as_predicted(counted(strategy, variant))


@two_ranks
def test_memory_of_a_step_of_adamw_and_of_sam() -> None:
    """To less than the smallest buffer that a unit has."""
    plain, sam = measured(Variant('SGD')), measured(SAM)
    memory = memory_of(sam)
    expected = {
        'before pass 1': memory.copy + memory.adam,
        'pass 1': memory.plain,
        'before pass 2': memory.ascent,
        'pass 2': memory.perturbed(),
    }
    assert sam['peaks'] == {what: pytest.approx(size, abs=LIMIT) for what, size in expected.items()}
    assert plain['peaks'] == {what: pytest.approx(expected[what], abs=LIMIT) for what in plain['peaks']}


@two_ranks
@pytest.mark.parametrize('variant', METHOD_CASES)
def test_a_method_adds_the_copies_it_states(variant: Variant) -> None:
    assert as_predicted(variant, measured(variant))


@two_ranks
@pytest.mark.parametrize('variant', [Variant('SGD'), SAM], ids=str)
def test_a_gradient_that_is_reduced_once_is_whole_on_every_rank(variant: Variant) -> None:
    """Its shard is not there then, and of the buffers of a unit less than half."""
    found = measured(variant, micro_batches=3, reduces_once=True)
    memory = memory_of(found)
    most = memory.accumulated + (memory.plain if variant.method is None else memory.perturbed())
    assert most - memory.units / 2 < max(found['peaks'].values()) <= most + LIMIT

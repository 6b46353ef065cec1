"""GradientGeometryMonitor beside methods whose rule is no offset, and intervals of both."""

from __future__ import annotations

import pytest
from digits import PER_EPOCH, build, logged_by

from composer_sam import SAM, SGDHess
from composer_sam.trainers.composer import GradientGeometryMonitor

NUMBERS = {'gradient_norm', 'direction_norm', 'cosine', 'share_larger', 'share_opposite'}
BATCHES = 2 * PER_EPOCH


@pytest.mark.parametrize('method', [SGDHess, SAM])
@pytest.mark.parametrize(
    ('interval', 'every', 'expected'),
    [(1, 1, range(1, BATCHES + 1)), (2, 1, [2, 4, 6, 8]), (2, 2, [4, 8]), (3, 1, [3, 6]), (BATCHES + 1, 1, [])],
)
def test_it_logs_the_steps_the_method_acts_on(
    method: type[SGDHess | SAM], interval: int, every: int, expected: list[int]
) -> None:
    trainer = build(method(interval=interval), recorder=GradientGeometryMonitor(every))
    trainer.fit()
    logged = {key: entries for key, entries in logged_by(trainer).items() if key.startswith('geometry/')}
    assert set(logged) == ({f'geometry/{name}' for name in NUMBERS} if expected else set())
    for entries in logged.values():
        assert [time.batch.value for time, _ in entries] == list(expected)
    if method is SGDHess:  # its direction enlarges entries of the gradient and turns none
        assert all(value == 0 for _, value in logged.get('geometry/share_opposite', []))
        assert all(value > 0.5 for _, value in logged.get('geometry/cosine', []))

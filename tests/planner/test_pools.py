"""Long-lived pools and what an allocator adds to them."""

import pytest

from megachat.planner.allocator import PARTLY_USED_BYTES
from megachat.planner.job import Role
from megachat.planner.pools import held_rounding, trained_bytes, trained_pools, weight_rounding
from megachat.planner.records import Pool
from tests.planner.jobs import role

MIB = 2**20


def test_trained_bytes_are_those_of_the_fullest_stage() -> None:
    setup = role("1.3b", 1, 4, 2)
    of_stages = [
        sum(item.num_bytes for item in trained_pools(Role.ACTOR, setup, stage))
        for stage in range(4)
    ]
    assert trained_bytes(setup) == max(of_stages) == of_stages[0]


def test_weights_of_opt_350m_round_by_what_is_left_of_their_segments() -> None:
    """A middle stage's matrices of 2 and 8 MiB: ten and two to a segment of 20 MiB."""
    setup = role("350m", 1, 4, 1)
    fused = 6 * MIB  # queries, keys and values: three to a segment
    a_layer = (20 * MIB // 3 - fused) + 2 * (10 - 8) * MIB
    found = weight_rounding(setup, 1) - PARTLY_USED_BYTES
    # Vectors of 1024 to 4096 elements are whole units of 512 bytes, and fill their segments.
    assert found == pytest.approx(6 * a_layer, abs=6 * 4096)


def test_what_trains_rounds_more_than_what_runs_forward() -> None:
    setup = role("13b", 4, 2, 1)
    for stage in (0, 1):
        pools = {item.pool: item.num_bytes for item in trained_pools(Role.ACTOR, setup, stage)}
        assert 0 < weight_rounding(setup, stage) < held_rounding(setup, stage)
        assert held_rounding(setup, stage) < 0.1 * sum(pools.values())
        assert pools[Pool.GRADIENTS] == 2 * (pools[Pool.WEIGHTS] + pools[Pool.EMBEDDINGS])

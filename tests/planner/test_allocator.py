"""The bound against a small allocator that follows torch's rules tensor by tensor."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.planner.allocator import PARTLY_USED_BYTES, reserved_bytes, rounding

MIB = 2**20


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        (0, 0),
        (1, 512),
        (512, 512),
        (MIB, MIB),
        (MIB + 1, 20 * MIB // 19),  # 19 of 1 MiB + 512 bytes in 20 MiB
        (6 * MIB, 20 * MIB // 3),
        (10 * MIB - 1, 20 * MIB // 2),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (25 * MIB, 26 * MIB),
    ],
)
def test_a_tensor_takes_its_share_of_a_segment(asked: int, taken: int) -> None:
    assert reserved_bytes(asked) == taken


def segments(size: int, count: int) -> int:
    """Bytes of the segments that `count` tensors of one size are put into, one after the other."""
    total = free = 0
    size = -(-size // 512) * 512
    for _ in range(count):
        if size > free:
            free = 2 * MIB if size <= MIB else 20 * MIB if size < 10 * MIB else 0
            total += free or -(-size // (2 * MIB)) * 2 * MIB
            free = free or size
        free -= size
    return total


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40 * MIB), st.integers(1, 200))
def test_many_tensors_of_one_size_take_no_more_than_is_planned(size: int, count: int) -> None:
    taken = segments(size, count)
    planned = size * count + rounding([size] * count)
    assert taken <= planned + PARTLY_USED_BYTES
    assert planned <= taken + count  # shares are rounded down by less than a byte

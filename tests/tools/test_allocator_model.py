"""The model of torch's caching allocator: its rules worked out by hand, and its invariants."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.errors import CapacityError, KernelError
from tools.allocator_model import MIB, Block, CachingAllocatorModel, ModelDriver

GB = 10**9


def allocator(capacity: int = 80 * GB, *, expandable: bool = False) -> CachingAllocatorModel:
    return CachingAllocatorModel(ModelDriver(capacity), expandable=expandable)


@pytest.mark.parametrize(
    ("wanted", "used", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        # What is left of a segment is cut off only where it is more than 1 MiB.
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (11 * MIB + 1, 12 * MIB, 12 * MIB),
        (19 * MIB, 20 * MIB, 20 * MIB),
    ],
)
def test_a_first_request_takes_a_segment_of_its_kind(wanted: int, used: int, reserved: int) -> None:
    model = allocator()
    if wanted == 19 * MIB:  # of a free segment of 20 MiB
        first, second = model.allocate(9 * MIB), model.allocate(9 * MIB)
        model.free(first)
        model.free(second)
    model.allocate(wanted)
    assert (model.used_bytes(), model.reserved_bytes()) == (used, reserved)


def test_the_smallest_free_block_serves_and_what_is_left_of_it_serves_others() -> None:
    model = allocator()
    blocks = [model.allocate(size * MIB) for size in (40, 30, 14)]
    for block in blocks:
        model.free(block)
    assert model.allocate(12 * MIB).address == blocks[2].address
    part = model.allocate(20 * MIB)
    assert part.address == blocks[1].address
    assert model.allocate(10 * MIB).address == part.address + 20 * MIB
    assert model.reserved_bytes() == 84 * MIB


def test_one_living_tensor_holds_its_whole_segment() -> None:
    model = allocator()
    large = model.allocate(1000 * MIB)
    model.free(large)
    small = model.allocate(12 * MIB)
    model.release_cached()
    assert small.address == large.address
    assert model.reserved_bytes() == 1000 * MIB and model.cached_bytes() == 988 * MIB
    model.free(small)
    model.release_cached()
    assert model.reserved_bytes() == 0


def test_of_an_expandable_segment_whole_pages_around_a_living_tensor_go_back() -> None:
    model = allocator(expandable=True)
    blocks = [model.allocate(size * MIB) for size in (500, 12, 488)]
    assert model.reserved_bytes() == 1000 * MIB
    model.free(blocks[0])
    model.free(blocks[2])
    model.release_cached()
    assert model.reserved_bytes() == 20 * MIB, "the page that holds 12 MiB from 500 MiB on"
    again = model.allocate(500 * MIB)
    assert again.address == blocks[0].address, "the hole is filled"
    assert model.reserved_bytes() == 520 * MIB


def test_neighbours_that_are_free_become_one_block() -> None:
    model = allocator()
    whole = model.allocate(40 * MIB)
    model.free(whole)
    parts = [model.allocate(10 * MIB) for _ in range(4)]
    assert model.reserved_bytes() == 40 * MIB
    for part in (parts[1], parts[3], parts[2], parts[0]):
        model.free(part)
    assert model.allocate(40 * MIB).address == whole.address


@pytest.mark.parametrize("expandable", [False, True])
def test_where_the_driver_has_nothing_left_free_segments_go_back_first(expandable: bool) -> None:
    model = allocator(100 * MIB, expandable=expandable)
    first = model.allocate(60 * MIB)
    model.allocate(20 * MIB)
    model.free(first)
    model.allocate(80 * MIB)
    with pytest.raises(CapacityError, match=r"wants 0\.03 GB for a tensor"):
        model.allocate(30 * MIB)


def test_a_driver_function_that_is_not_modelled_is_named() -> None:
    with pytest.raises(KernelError, match="cuMemFree is not modelled"):
        ModelDriver(GB).call("cuMemFree")


SIZES = st.integers(1, 64 * MIB) | st.integers(1, 4096) | st.integers(MIB - 600, MIB + 600)
STEPS = st.lists(SIZES | st.integers(-40, -1) | st.none(), max_size=40)
"""Sizes to allocate; a number below zero frees one of the living blocks; None releases."""


@given(steps=STEPS, expandable=st.booleans())
@settings(max_examples=40, deadline=None)
def test_blocks_never_overlap_and_all_memory_is_accounted_for(
    steps: list[int | None], expandable: bool
) -> None:
    driver = ModelDriver(80 * GB)
    model = CachingAllocatorModel(driver, expandable=expandable)
    alive: list[Block] = []
    for step in steps:
        if step is None:
            model.release_cached()
        elif step > 0:
            alive.append(model.allocate(step))
            assert alive[-1].num_bytes >= step
        elif alive:
            model.free(alive.pop(step % len(alive)))
        spans = sorted((block.address, block.address + block.num_bytes) for block in alive)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
        assert model.used_bytes() == sum(end - start for start, end in spans)
        assert 0 <= model.cached_bytes() and driver.used_bytes <= driver.capacity_bytes
    for block in alive:
        model.free(block)
    model.release_cached()
    assert driver.used_bytes == model.used_bytes() == 0

"""The ledger of a device against storages of known sizes."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megachat.parallel.memory import MovableTensors
from tools.allocator_model import MIB, CachingAllocatorModel, ModelDriver
from tools.ledger import DeviceLedger


@pytest.fixture
def ledger() -> Iterator[DeviceLedger]:
    """Of an empty device; the body runs on fake tensors."""
    found = DeviceLedger(CachingAllocatorModel(ModelDriver(10**11)), row_tokens=7)
    with FakeTensorMode(allow_non_fake_inputs=True), found:
        yield found


def used(ledger: DeviceLedger) -> int:
    gc.collect()
    ledger.settle()
    return ledger.allocator.used_bytes()


def test_a_storage_is_a_block_for_as_long_as_some_view_of_it_lives(ledger: DeviceLedger) -> None:
    tensor = torch.empty(100 * MIB, dtype=torch.uint8)
    part = tensor.view(10, -1)[3:5]
    doubled = tensor + tensor
    assert used(ledger) == 200 * MIB
    del tensor, doubled
    assert used(ledger) == 100 * MIB
    del part
    assert used(ledger) == 0 and ledger.allocator.reserved_bytes() == 200 * MIB


def test_offloading_frees_blocks_and_takes_none_for_the_host(ledger: DeviceLedger) -> None:
    tensors = [torch.empty(size * MIB, dtype=torch.uint8) for size in (40, 60)]
    movable = MovableTensors(tensors)
    for _ in range(2):
        movable.to_host()
        assert used(ledger) == 0
        movable.restore()
        assert used(ledger) == 100 * MIB


def test_real_memory_and_views_of_it_are_not_the_allocators(ledger: DeviceLedger) -> None:
    real = torch.frombuffer(bytearray(64 * MIB), dtype=torch.uint8)
    view = real[: 32 * MIB].view(torch.float32).view(2, -1)
    assert used(ledger) == 0
    copy = view.clone()
    assert used(ledger) == copy.nbytes


def test_a_mask_picks_everything_and_a_length_is_that_of_a_full_row(ledger: DeviceLedger) -> None:
    rows = torch.zeros(3, 5)
    assert rows[rows >= 0].shape == (15,)
    assert rows[rows[:, 0] >= 0].shape == (3, 5)
    assert float(rows.sum()) == 1.0 and len(ledger.reads) == 1


def test_a_storage_that_dies_inside_an_operation_of_the_allocator_is_freed_later(
    ledger: DeviceLedger,
) -> None:
    """The garbage collector runs whenever it likes."""
    cycle: list[object] = [torch.empty(50 * MIB, dtype=torch.uint8)]
    cycle.append(cycle)
    allocate = ledger.allocator.allocate

    def collect_meanwhile(num_bytes: int) -> object:
        gc.collect()
        return allocate(num_bytes)

    assert used(ledger) == 50 * MIB
    del cycle
    ledger.allocator.allocate = collect_meanwhile  # type: ignore[method-assign, assignment]
    kept = torch.empty(30 * MIB, dtype=torch.uint8)
    assert used(ledger) == kept.nbytes

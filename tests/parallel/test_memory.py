"""Address-stable memory: pages come at the first write and go on release, addresses stay."""

import ctypes
import gc
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from megachat.errors import ConfigError, KernelError, PhaseError
from megachat.parallel.memory import (
    PAGE_BYTES,
    AddressStableBuffer,
    MovableTensors,
    ReallocatedBuffer,
    phase_memory,
)

CPU = torch.device("cpu")
MEBIBYTE = 1 << 20


def _resident_set() -> int:
    """Bytes of this process in physical memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def _return_freed_memory() -> None:
    """Makes the C library give back what it keeps of freed memory for later."""
    ctypes.CDLL(None).malloc_trim(0)


def test_memory_is_taken_at_the_first_write_only() -> None:
    buffer = AddressStableBuffer(64 * MEBIBYTE, CPU)
    assert buffer.resident_bytes() == 0
    buffer.tensor()[: 8 * MEBIBYTE].fill_(1)
    assert buffer.resident_bytes(0, 8 * MEBIBYTE) == 8 * MEBIBYTE
    assert buffer.resident_bytes(16 * MEBIBYTE) == 0


def test_release_returns_pages_to_the_system_and_keeps_the_address() -> None:
    buffer = AddressStableBuffer(64 * MEBIBYTE, CPU)
    view, address = buffer.tensor().view(torch.float32), buffer.address
    view.fill_(3.0)
    filled = _resident_set()
    buffer.release()
    assert buffer.resident_bytes() == 0
    assert filled - _resident_set() > 60 * MEBIBYTE
    assert view.data_ptr() == buffer.address == address
    assert float(view.sum()) == 0.0
    view.fill_(2.0)
    assert float(view[-1]) == 2.0


def test_a_range_is_released_in_whole_pages_and_its_neighbours_stay() -> None:
    buffer = AddressStableBuffer(8 * PAGE_BYTES, CPU)
    data = buffer.tensor().fill_(7)
    buffer.release(PAGE_BYTES + 1, 5 * PAGE_BYTES - 1)
    expected = torch.full_like(data, 7)
    expected[2 * PAGE_BYTES : 4 * PAGE_BYTES] = 0
    # Compared before reading maps the zero page again.
    assert buffer.resident_bytes(2 * PAGE_BYTES, 4 * PAGE_BYTES) == 0
    assert torch.equal(data, expected)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _has_large_pages() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.is_file() and "[never]" not in setting.read_text(encoding="ascii")


@pytest.mark.skipif(not _has_large_pages(), reason="this system has no transparent large pages")
def test_large_pages_spare_faults_and_take_nothing_beside_their_range() -> None:
    buffer = AddressStableBuffer(64 * MEBIBYTE, CPU, large_pages=True)
    start, stop = MEBIBYTE + 5, 61 * MEBIBYTE - 7
    buffer.acquire(start, stop)
    before = _faults()
    buffer.tensor()[start:stop].fill_(3)
    assert _faults() - before < stop // PAGE_BYTES // 8
    assert buffer.resident_bytes() <= stop - start + 2 * PAGE_BYTES
    buffer.release(7 * MEBIBYTE + 1, 50 * MEBIBYTE)  # of a large page, too
    assert buffer.resident_bytes(7 * MEBIBYTE + PAGE_BYTES, 50 * MEBIBYTE) == 0
    assert int(buffer.tensor()[start : 7 * MEBIBYTE].min()) == 3
    assert int(buffer.tensor()[50 * MEBIBYTE : stop].min()) == 3


def test_a_range_within_one_page_releases_nothing() -> None:
    buffer = AddressStableBuffer(PAGE_BYTES, CPU)
    buffer.tensor().fill_(7)
    buffer.release(1, PAGE_BYTES - 1)
    assert int(buffer.tensor().min()) == 7


def test_sizes_are_rounded_up_to_pages() -> None:
    assert AddressStableBuffer(1, CPU).num_bytes == PAGE_BYTES
    assert AddressStableBuffer(PAGE_BYTES + 1, CPU).tensor().shape == (2 * PAGE_BYTES,)


def test_more_than_the_machine_has_can_be_reserved() -> None:
    buffer = AddressStableBuffer(1 << 40, CPU)
    buffer.tensor()[-1] = 5
    assert int(buffer.tensor()[-1]) == 5


def test_a_view_outlives_the_buffer_object() -> None:
    buffer = AddressStableBuffer(PAGE_BYTES, CPU)
    view = buffer.tensor().view(torch.int64)
    view.fill_(11)
    del buffer
    gc.collect()
    assert int(view.sum()) == 11 * view.numel()


def test_memory_returns_when_the_last_view_goes() -> None:
    before = _resident_set()
    for _ in range(4):
        AddressStableBuffer(64 * MEBIBYTE, CPU).tensor().fill_(1)
    gc.collect()
    assert _resident_set() - before < 32 * MEBIBYTE


@pytest.mark.parametrize(("start", "stop"), [(-1, 0), (5, 4), (0, 3 * PAGE_BYTES)])
def test_a_range_outside_the_buffer_is_refused(start: int, stop: int) -> None:
    buffer = AddressStableBuffer(2 * PAGE_BYTES, CPU)
    for use in (buffer.acquire, buffer.release):
        with pytest.raises(ConfigError, match=f"{start} to {stop} are no range"):
            use(start, stop)


def test_sizes_and_devices_that_cannot_be_served_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 were asked for"):
        AddressStableBuffer(0, CPU)
    with pytest.raises(KernelError, match="not on meta"):
        AddressStableBuffer(1, torch.device("meta"))


def test_ordinary_memory_comes_and_goes_behind_the_same_views() -> None:
    buffer = ReallocatedBuffer(64 * MEBIBYTE, CPU)
    assert buffer.resident_bytes() == 0
    view = buffer.tensor().view(torch.float32).view(2, -1)
    for value in (1.0, 2.0):
        buffer.acquire()
        buffer.acquire()
        assert buffer.resident_bytes() == 64 * MEBIBYTE
        view.fill_(value)
        assert float(view[1, -1]) == value
        _return_freed_memory()
        filled = _resident_set()
        buffer.release()
        # A large enough hole of the heap serves the allocation instead of a mapping of its own.
        _return_freed_memory()
        assert buffer.resident_bytes() == 0
        assert filled - _resident_set() > 60 * MEBIBYTE


def test_each_kind_of_device_gets_the_memory_that_suits_it() -> None:
    assert isinstance(phase_memory(PAGE_BYTES, CPU), AddressStableBuffer)
    assert isinstance(phase_memory(PAGE_BYTES, torch.device("meta")), ReallocatedBuffer)


def test_tensors_come_back_from_the_host_behind_the_views_of_them() -> None:
    base = torch.arange(24, dtype=torch.float32)
    view, other = base.view(4, 6)[1:3], torch.full((5,), 2, dtype=torch.bfloat16)
    expected = view.clone(), other.clone()
    movable = MovableTensors([base, view, other])
    assert movable.num_bytes == movable.device_bytes == 24 * 4 + 5 * 2
    for _ in range(2):
        movable.to_host()
        movable.to_host()
        assert movable.device_bytes == 0 and movable.num_bytes == 106
        movable.restore()
        movable.restore()
        assert movable.device_bytes == 106
        assert torch.equal(view, expected[0]) and torch.equal(other, expected[1])
        view += 1  # the next way carries what was written since
        expected = view.clone(), other.clone()


def test_discarded_tensors_come_back_as_zeros() -> None:
    tensor = torch.ones(6)
    movable = MovableTensors([tensor])
    movable.discard()
    assert movable.device_bytes == 0
    movable.restore()
    assert torch.equal(tensor, torch.zeros(6))


def test_constant_tensors_travel_to_the_host_once() -> None:
    tensor = torch.ones(6)
    movable = MovableTensors([tensor], constant=True)
    movable.to_host()
    movable.restore()
    tensor.fill_(5.0)  # against the promise: shows that the first copy is what returns
    movable.to_host()
    movable.restore()
    assert torch.equal(tensor, torch.ones(6))


def test_memory_is_told_apart_by_its_storages() -> None:
    first, second = torch.ones(3), torch.ones(3)
    assert MovableTensors([first]).holds_what(MovableTensors([first[1:]]))
    assert not MovableTensors([first]).holds_what(MovableTensors([second]))


def test_what_has_left_is_no_longer_resident() -> None:
    tensor = torch.ones(64 * MEBIBYTE, dtype=torch.uint8)
    movable = MovableTensors([tensor])
    _return_freed_memory()
    filled = _resident_set()
    movable.discard()
    _return_freed_memory()
    assert filled - _resident_set() > 60 * MEBIBYTE


@pytest.mark.parametrize("kind", [AddressStableBuffer, ReallocatedBuffer])
def test_a_closed_buffer_gives_its_memory_back_once_and_is_not_acquired_again(kind: Any) -> None:
    buffer = kind(4 * PAGE_BYTES, CPU)
    buffer.acquire()
    buffer.tensor().fill_(1)
    assert buffer.resident_bytes() == 4 * PAGE_BYTES
    for _ in range(2):
        buffer.close()
    assert buffer.resident_bytes() == 0
    with pytest.raises(PhaseError, match=f"{kind.__name__} was closed"):
        buffer.acquire()

"""Address-stable device memory over a stand-in for the CUDA driver, compiled from C++ here.

Where CUDA's own header is installed, the stand-in is compiled with it, so that signatures and
record layouts are the driver's. `tests/hybrid/test_gpu.py` runs the code over a GPU's driver.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megachat.errors import CapacityError, ConfigError, KernelError, PhaseError
from megachat.parallel.device_memory import (
    AccessDescription,
    AllocationProperties,
    CudaDriver,
    DriverUse,
    MappedDeviceBuffer,
    driver_use,
)
from megachat.reshard.arena import WeightArena
from megachat.reshard.execute import Resharder
from tests.harness import run_ranks
from tests.harness.groups import groups_of
from tests.reshard.cases import PRE_LN, Case, build_actor

CPU = torch.device("cpu")
GRANULE = 1 << 16
WIDE = replace(PRE_LN, hidden=256, ffn=1024, embed_dim=256, layers=2)
"""Slots of several granules."""
SOURCE = Path(__file__).with_name("driver_stub.cpp")


def cuda_header_folder() -> Path | None:
    """Where the CUDA toolkit that nvcc belongs to keeps cuda.h."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        return None
    folders = Path(compiler).resolve().parents[1].glob("**/include")
    known = [Path("/usr/local/cuda/include"), *folders]
    return next((folder for folder in known if (folder / "cuda.h").is_file()), None)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("driver") / "libdriver.so"
    header = cuda_header_folder()
    options = [] if header is None else ["-DWITH_CUDA_H", f"-I{header}"]
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", *options]
    subprocess.run([*command, str(SOURCE), "-o", str(target)], check=True)
    return target


@pytest.fixture
def driver(library: Path) -> Iterator[CudaDriver]:
    yield CudaDriver(str(library))
    ctypes.CDLL(str(library)).stub_limit(ctypes.c_longlong(-1))


def granules(library: Path) -> tuple[int, int]:
    """(existing, mapped) granules of all buffers."""
    stub = ctypes.CDLL(str(library))
    return int(stub.stub_live_granules()), int(stub.stub_mapped_granules())


def test_records_have_the_layout_of_the_driver(library: Path) -> None:
    stub = ctypes.CDLL(str(library))
    assert stub.stub_size_of_properties() == ctypes.sizeof(AllocationProperties)
    assert stub.stub_size_of_access() == ctypes.sizeof(AccessDescription)


def test_memory_comes_and_goes_behind_views_at_one_address(
    driver: CudaDriver, library: Path
) -> None:
    before = granules(library)
    buffer = MappedDeviceBuffer(5 * GRANULE - 7, CPU, driver=driver)
    view = buffer.tensor().view(torch.float32)
    assert (buffer.num_bytes, buffer.resident_bytes()) == (5 * GRANULE, 0)
    for value in (1.0, 2.0):
        buffer.acquire()
        buffer.acquire()
        view.fill_(value)
        assert float(view[-1]) == value and view.data_ptr() == buffer.address
        assert buffer.resident_bytes() == 5 * GRANULE
        assert granules(library) == (before[0] + 5, before[1] + 5)
        buffer.release()
        buffer.release()
        assert buffer.resident_bytes() == 0 and granules(library) == before


def test_a_range_takes_every_granule_it_touches_and_gives_back_those_it_covers(
    driver: CudaDriver,
) -> None:
    buffer = MappedDeviceBuffer(8 * GRANULE, CPU, driver=driver)
    data = buffer.tensor()
    buffer.acquire(GRANULE + 1, 2 * GRANULE + 1)
    buffer.acquire(5 * GRANULE, 6 * GRANULE)
    assert buffer.resident_bytes() == 3 * GRANULE
    data[GRANULE : 3 * GRANULE] = 7
    data[5 * GRANULE : 6 * GRANULE] = 9
    buffer.acquire()  # around what is there, whose content stays
    assert data[GRANULE : 3 * GRANULE].eq(7).all() and data[5 * GRANULE : 6 * GRANULE].eq(9).all()
    buffer.release(2 * GRANULE + 1, 5 * GRANULE + 1)  # what came with it comes back with it
    assert buffer.resident_bytes() == 6 * GRANULE
    assert data[GRANULE : 3 * GRANULE].eq(7).all() and data[5 * GRANULE : 6 * GRANULE].eq(9).all()
    buffer.release()


def test_a_device_without_memory_is_named_and_loses_nothing(
    driver: CudaDriver, library: Path
) -> None:
    before = granules(library)
    buffer = MappedDeviceBuffer(8 * GRANULE, CPU, driver=driver)
    buffer.acquire(0, GRANULE)
    buffer.tensor()[:GRANULE] = 3
    ctypes.CDLL(str(library)).stub_limit(ctypes.c_longlong(before[0] + 4))
    with pytest.raises(CapacityError, match="out of memory"):
        buffer.acquire()
    assert buffer.resident_bytes() == GRANULE and granules(library)[0] == before[0] + 1
    assert buffer.tensor()[:GRANULE].eq(3).all()
    buffer.release()


class CountedCache:
    """An allocator that keeps granules of the device, and counts how often it is asked for them."""

    def __init__(self, library: Path, *, granules: int) -> None:
        self._stub = ctypes.CDLL(str(library))
        self.granules, self.calls, self.left = granules, 0, 0

    def leave(self, granules: int) -> None:
        """The device has that many in all beside what is kept here."""
        self.left = granules
        self._stub.stub_limit(ctypes.c_longlong(granules))

    def release_cached(self) -> None:
        self.calls += 1
        self.leave(self.left + self.granules)
        self.granules = 0

    def used_bytes(self) -> int:
        return 3_000_000_000

    def cached_bytes(self) -> int:
        return self.granules * GRANULE


@pytest.mark.parametrize("kept", [5, 4])
def test_what_the_allocator_keeps_is_asked_for_once_before_the_device_is_full(
    driver: CudaDriver, library: Path, kept: int
) -> None:
    before = granules(library)
    cache = CountedCache(library, granules=kept)
    buffer = MappedDeviceBuffer(8 * GRANULE, CPU, driver=driver, allocator=cache)
    buffer.acquire(0, GRANULE)
    buffer.tensor()[:GRANULE] = 3
    assert cache.calls == 0, "as long as the driver has memory, nobody is asked"
    cache.leave(before[0] + 3)
    if kept == 5:
        buffer.acquire()
        assert buffer.resident_bytes() == 8 * GRANULE
        buffer.tensor()[GRANULE:] = 4
    else:
        with pytest.raises(CapacityError, match=r"offload more") as caught:
            buffer.acquire()
        assert buffer.resident_bytes() == GRANULE and granules(library)[0] == before[0] + 1
        for number in ("0.00 GB are wanted", "torch's tensors take 3.00 GB", "0.00 GB of its"):
            assert number in str(caught.value)
    assert cache.calls == 1
    assert buffer.tensor()[:GRANULE].eq(3).all()
    buffer.release()


def test_the_numbers_of_both_sides_are_said_when_the_device_is_full(
    driver: CudaDriver, library: Path
) -> None:
    """2^27 bytes are 2,048 granules and 0.13 GB."""
    buffer = MappedDeviceBuffer(8 << 27, CPU, driver=driver)
    buffer.acquire(0, 1 << 27)
    live = granules(library)[0]
    ctypes.CDLL(str(library)).stub_limit(ctypes.c_longlong(live + (2 << 11)))
    with pytest.raises(CapacityError) as caught:
        buffer.acquire(0, 4 << 27)
    message = str(caught.value)
    for part in ("0.40 GB are wanted beside the 0.13 GB", "the driver has 0.27 of 0.4"):
        assert part in message, message
    buffer.release()


def test_large_memory_comes_in_few_pieces(driver: CudaDriver) -> None:
    """One piece for each granule of 2 MiB would be tens of thousands of calls at a phase change."""
    calls: list[str] = []

    class Counted:
        def call(self, name: str, *arguments: object) -> None:
            calls.append(name)
            driver.call(name, *arguments)

    buffer = MappedDeviceBuffer(1100 * GRANULE, CPU, driver=Counted())
    buffer.acquire()
    assert calls.count("cuMemCreate") == calls.count("cuMemMap") == 3  # of up to 512 granules
    assert buffer.resident_bytes() == 1100 * GRANULE
    buffer.tensor()[-1] = 1
    buffer.release()
    assert calls.count("cuMemUnmap") == 3 and buffer.resident_bytes() == 0


def test_other_failures_ranges_sizes_and_a_missing_driver_are_named(driver: CudaDriver) -> None:
    with pytest.raises(KernelError, match="cuMemUnmap failed with CUDA status 1"):
        driver.call("cuMemUnmap", ctypes.c_uint64(0), ctypes.c_size_t(GRANULE))
    buffer = MappedDeviceBuffer(GRANULE, CPU, driver=driver)
    with pytest.raises(ConfigError, match="bytes 5 to 4 are no range"):
        buffer.release(5, 4)
    with pytest.raises(ConfigError, match="0 were asked for"):
        MappedDeviceBuffer(0, CPU, driver=driver)
    with pytest.raises(KernelError, match="libnothing.so: cannot be opened"):
        CudaDriver("libnothing.so")


def _reshard(library: str) -> None:
    """A real reshard over an arena in mapped memory: own slots stay, foreign ones come and go."""
    case = Case(train=(2, 1, 1), generate=1)
    groups = groups_of(case.source)
    plain = build_actor(case, WIDE, torch.float32, groups=groups)
    memory = MappedDeviceBuffer(plain.arena.num_bytes, CPU, driver=CudaDriver(library))
    plan, rank = plain.arena.plan, plain.arena.part.rank
    arena = WeightArena(plan, rank=rank, dtype=torch.float32, device=CPU, memory=lambda _: memory)
    own = memory.resident_bytes()
    assert 0 < own < memory.num_bytes
    arena.adopt(build_actor(case, WIDE, torch.float32, groups=groups).model)
    Resharder(plain.arena, plain.groups).gather()
    resharder = Resharder(arena, plain.groups)
    for _ in range(2):
        resharder.gather()
        assert memory.resident_bytes() == memory.num_bytes
        for name, weight in plain.arena.weights().items():
            assert torch.equal(arena.weights()[name], weight), name
        arena.release()
        assert memory.resident_bytes() == own


def test_an_arena_in_mapped_memory_gives_back_what_belongs_to_other_ranks(library: Path) -> None:
    run_ranks(2, _reshard, str(library))


def test_a_closed_buffer_gives_memory_and_addresses_back_once(
    driver: CudaDriver, library: Path
) -> None:
    stub, before = ctypes.CDLL(str(library)), granules(library)
    reservations = stub.stub_reservations()
    buffer = MappedDeviceBuffer(3 * GRANULE, CPU, driver=driver)
    buffer.acquire(0, GRANULE)
    assert stub.stub_reservations() == reservations + 1
    for _ in range(2):
        buffer.close()
    assert (granules(library), stub.stub_reservations()) == (before, reservations)
    assert buffer.tensor().numel() == buffer.resident_bytes() == 0
    with pytest.raises(PhaseError, match="MappedDeviceBuffer was closed"):
        buffer.acquire()


def test_the_peak_of_the_driver_counts_pools_and_mapped_memory_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks = iter([70, 50, 20, 90, 10, 0])  # of torch's pools, since it was last asked
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    use = DriverUse(torch.device("cuda", 0))
    use.begin()  # what was before, the 70, is forgotten
    use.change_mapped(30)  # 50 beside nothing
    use.change_mapped(40)  # 20 beside 30
    use.change_mapped(-60)  # 90 beside 70
    assert use.peak() == 160  # then 10 beside 10
    use.begin()


def test_buffers_count_what_they_have_mapped(driver: CudaDriver) -> None:
    use = driver_use(CPU)
    use.begin()
    before = use.peak()
    with MappedDeviceBuffer(4 * GRANULE, CPU, driver=driver) as buffer:
        buffer.acquire(0, 3 * GRANULE)
        buffer.acquire()
        buffer.release(0, 3 * GRANULE)
        assert use.peak() == before + 4 * GRANULE
    use.begin()
    assert use.peak() == before

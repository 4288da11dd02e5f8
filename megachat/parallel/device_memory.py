"""The one place for address-stable memory on CUDA devices: the driver's virtual memory functions.

An address range is reserved once; physical memory is mapped behind it in pieces of whole granules
and unmapped again between phases, so that views, communicators and CUDA graphs keep their
addresses. The functions are those of "Virtual Memory Management" in the CUDA driver API
(`cuMemAddressReserve`, `cuMemCreate`, `cuMemMap`, ...), called through ctypes: nothing links
against the driver.

The driver's other customer is torch's caching allocator, which keeps what tensors leave. It is
asked for that before the device counts as full.

The tests run it over a stand-in for the driver that maps host memory and refuses what the driver
refuses; those marked `gpu` run it over the driver.
"""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from megachat.errors import CapacityError, ConfigError, KernelError
from megachat.parallel.lifetime import Owner

_LIBRARY = "libcuda.so.1"
_OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY."""
_PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 3
"""CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE and
CU_MEM_ACCESS_FLAGS_PROT_READWRITE."""


_MOST_GRANULES = 512
"""Of one piece of memory: 1 GiB where a granule has 2 MiB. Fewer pieces are fewer calls."""
_REMEDY = "lower rlhf.generation.kv_cache_gb, or offload more (rlhf.memory)"


class AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location_type", ctypes.c_int),
        ("location_id", ctypes.c_int),
        ("win32_handle_metadata", ctypes.c_void_p),
        ("compression_type", ctypes.c_ubyte),
        ("gpu_direct_rdma_capable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class AccessDescription(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (
        ("location_type", ctypes.c_int),
        ("location_id", ctypes.c_int),
        ("flags", ctypes.c_int),
    )


class CudaDriver:
    """Calls driver functions and turns their status into exceptions."""

    def __init__(self, library: str = _LIBRARY) -> None:
        """Opens the driver's library.

        Raises:
            KernelError: There is none.
        """
        try:
            self._functions = ctypes.CDLL(library)
        except OSError as error:
            raise KernelError(
                f"{library}: cannot be opened ({error}): install the NVIDIA driver, or run on the "
                "CPU"
            ) from error

    def call(self, name: str, *arguments: object) -> None:
        """Calls a function that returns a CUresult.

        Raises:
            CapacityError: The device has no memory left.
            KernelError: Any other status.
        """
        check_status(name, self._functions[name](*arguments))


class Driver(Protocol):
    """Calls functions of the CUDA driver by name, with ctypes arguments."""

    def call(self, name: str, *arguments: object) -> None:
        """As `CudaDriver.call`."""


def check_status(name: str, status: int) -> None:
    """Turns what a driver function returned into an exception.

    Raises:
        CapacityError: The device has no memory left.
        KernelError: Any other status but success.
    """
    if status == _OUT_OF_MEMORY:
        raise CapacityError(f"{name}: the device is out of memory: {_REMEDY}")
    if status:
        raise KernelError(f"{name} failed with CUDA status {status}: see the driver's log")


class CachingAllocator(Protocol):
    """Who takes memory of the device from the driver for tensors, and keeps what they leave."""

    def release_cached(self) -> None:
        """Hands what is kept for later tensors back to the driver, as far as it can be."""

    def used_bytes(self) -> int:
        """Bytes of living tensors."""

    def cached_bytes(self) -> int:
        """Bytes taken from the driver that no tensor uses now."""


class TorchAllocator:
    """torch's caching allocator; a device other than CUDA has none."""

    def __init__(self, device: torch.device) -> None:
        """Notes the device."""
        self._device = device

    def release_cached(self) -> None:
        """Frees cached segments; waits for the device. Pools of living CUDA graphs stay."""
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                torch.cuda.empty_cache()

    def used_bytes(self) -> int:
        """Bytes of living tensors."""
        if self._device.type != "cuda":
            return 0
        return int(torch.cuda.memory_allocated(self._device))

    def cached_bytes(self) -> int:
        """Bytes that no tensor uses."""
        if self._device.type != "cuda":
            return 0
        return int(torch.cuda.memory_reserved(self._device)) - self.used_bytes()


class DriverUse:
    """Bytes that this process has taken from a device's driver, and the peak of their sum.

    Torch counts the peak of its own pools. What is mapped beside them changes at phase changes
    only, so between two changes the sum has its peak where the pools have theirs.
    """

    def __init__(self, device: torch.device) -> None:
        """Of a device; only CUDA devices have pools."""
        self._device = device
        self._mapped = self._peak = 0

    def begin(self) -> None:
        """Starts the peak anew."""
        self._take_peak_of_pools()
        self._peak = 0

    def change_mapped(self, num_bytes: int) -> None:
        """Takes note of bytes that were mapped, or, below zero, unmapped."""
        self._peak = max(self._peak, self._take_peak_of_pools() + self._mapped)
        self._mapped += num_bytes

    def peak(self) -> int:
        """The most bytes at once since `begin`."""
        self.change_mapped(0)
        return self._peak

    def _take_peak_of_pools(self) -> int:
        if self._device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_reserved(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


@functools.cache
def driver_use(device: torch.device) -> DriverUse:
    """What this process takes from a device's driver."""
    return DriverUse(device)


class MappedDeviceBuffer(Owner):
    """A range of device addresses whose physical memory comes and goes.

    It comes in pieces of whole granules and goes in the same pieces.
    """

    def __init__(
        self,
        num_bytes: int,
        device: torch.device,
        *,
        driver: Driver | None = None,
        allocator: CachingAllocator | None = None,
    ) -> None:
        """Reserves addresses; takes no memory.

        Args:
            num_bytes: Size, rounded up to granules.
            device: Where the memory is; its context must exist, as after `torch.cuda.set_device`.
            driver: None opens the installed one.
            allocator: Whose cached memory the driver gets back when it has none left; None is
                torch's.

        Raises:
            ConfigError: The size is not positive.
            KernelError: There is no driver, or it lacks these functions.
        """
        if num_bytes <= 0:
            raise ConfigError(f"a buffer needs at least 1 byte, {num_bytes} were asked for")
        self.device = device
        self._driver = driver or CudaDriver()
        self._allocator = allocator or TorchAllocator(device)
        self._properties = AllocationProperties(
            type=_PINNED, location_type=_ON_DEVICE, location_id=device.index or 0
        )
        granule = ctypes.c_size_t()
        self._driver.call(
            "cuMemGetAllocationGranularity",
            ctypes.byref(granule),
            ctypes.byref(self._properties),
            ctypes.c_int(0),
        )
        self.granule_bytes = granule.value
        self._mapped = [False] * -(-num_bytes // granule.value)
        self._pieces: dict[int, range] = {}
        """By the number of their first granule."""
        self.num_bytes = len(self._mapped) * granule.value
        address = ctypes.c_uint64()
        self._driver.call(
            "cuMemAddressReserve",
            ctypes.byref(address),
            ctypes.c_size_t(self.num_bytes),
            ctypes.c_size_t(0),
            ctypes.c_uint64(0),
            ctypes.c_uint64(0),
        )
        self.address = address.value
        storage = torch._C._construct_storage_from_data_pointer(
            self.address, device, self.num_bytes
        )
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)

    def tensor(self) -> Tensor:
        """The whole buffer, `[num_bytes]` uint8; only what is mapped may be touched.

        The addresses are reserved until `close`: views may outlive this object otherwise.
        """
        return self._bytes

    def acquire(self, start: int = 0, stop: int | None = None) -> None:
        """Maps memory behind a range of bytes; content is undefined where it was not mapped.

        Where the driver has no memory left, the allocator's cached memory goes back to it, once.

        Args:
            start: First byte of the range.
            stop: First byte after it; None means the end of the buffer.

        Raises:
            ConfigError: The range does not lie within the buffer.
            CapacityError: The device has no memory left; what this call mapped is given back.
            PhaseError: The buffer was closed.
        """
        self.check_open()
        first, last = self._range(start, stop)
        wanted = range(first // self.granule_bytes, -(-last // self.granule_bytes))
        pieces = list(_pieces([number for number in wanted if not self._mapped[number]]))
        num_bytes = sum(map(len, pieces)) * self.granule_bytes
        try:
            try:
                self._map_all(pieces)
            except CapacityError:
                self._allocator.release_cached()
                self._map_all(pieces)
            driver_use(self.device).change_mapped(num_bytes)
        except (CapacityError, KernelError) as error:
            for piece in pieces:
                if piece.start in self._pieces:
                    self._unmap(piece)
            if isinstance(error, CapacityError):
                raise CapacityError(self._shortage(num_bytes)) from error
            raise

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Unmaps the pieces that lie wholly within a range of bytes; addresses stay.

        Who acquired a range and releases the same one gives all of it back, but for granules that
        were there before.

        Raises:
            ConfigError: The range does not lie within the buffer.
        """
        first, last = self._range(start, stop)
        self._finish_work()
        before = self.resident_bytes()
        for piece in list(self._pieces.values()):
            if first <= piece.start * self.granule_bytes and (
                piece.stop * self.granule_bytes <= last
            ):
                self._unmap(piece)
        driver_use(self.device).change_mapped(self.resident_bytes() - before)

    def resident_bytes(self) -> int:
        """Bytes of physical memory behind the buffer."""
        return sum(self._mapped) * self.granule_bytes

    def _end(self) -> None:
        """Unmaps everything and gives the addresses back: nobody may touch a view from now on."""
        self.release()
        self._driver.call(
            "cuMemAddressFree", ctypes.c_uint64(self.address), ctypes.c_size_t(self.num_bytes)
        )
        self._bytes = self._bytes.new_empty(0)

    def _map_all(self, pieces: Sequence[range]) -> None:
        """Takes memory for those pieces that have none yet."""
        for piece in pieces:
            if piece.start not in self._pieces:
                self._map(piece)

    def _map(self, piece: range) -> None:
        handle, size = ctypes.c_uint64(), self._size(piece)
        self._driver.call(
            "cuMemCreate",
            ctypes.byref(handle),
            size,
            ctypes.byref(self._properties),
            ctypes.c_uint64(0),
        )
        try:
            self._driver.call(
                "cuMemMap", self._at(piece), size, ctypes.c_size_t(0), handle, ctypes.c_uint64(0)
            )
        finally:
            # What is mapped lives until it is unmapped; the handle is not needed again.
            self._driver.call("cuMemRelease", handle)
        self._note(piece, is_mapped=True)
        description = AccessDescription(
            location_type=_ON_DEVICE, location_id=self.device.index or 0, flags=_READ_WRITE
        )
        self._driver.call(
            "cuMemSetAccess",
            self._at(piece),
            size,
            ctypes.byref(description),
            ctypes.c_size_t(1),
        )

    def _unmap(self, piece: range) -> None:
        self._driver.call("cuMemUnmap", self._at(piece), self._size(piece))
        self._note(piece, is_mapped=False)

    def _note(self, piece: range, *, is_mapped: bool) -> None:
        for number in piece:
            self._mapped[number] = is_mapped
        if is_mapped:
            self._pieces[piece.start] = piece
        else:
            del self._pieces[piece.start]

    def _shortage(self, wanted: int) -> str:
        """Why a number of bytes cannot be had: who has the device's memory."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return (
            f"{self.device} is out of memory: {_gb(wanted)} GB are wanted beside the "
            f"{_gb(self.resident_bytes())} GB that this buffer has, and the driver has "
            f"{_gb(free.value)} of {_gb(total.value)} GB; torch's tensors take "
            f"{_gb(self._allocator.used_bytes())} GB, and it cannot give back "
            f"{_gb(self._allocator.cached_bytes())} GB of its cache: {_REMEDY}"
        )

    def _at(self, piece: range) -> ctypes.c_uint64:
        """Address of a piece."""
        return ctypes.c_uint64(self.address + piece.start * self.granule_bytes)

    def _size(self, piece: range) -> ctypes.c_size_t:
        """Bytes of a piece."""
        return ctypes.c_size_t(len(piece) * self.granule_bytes)

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        last = self.num_bytes if stop is None else stop
        if not 0 <= start <= last <= self.num_bytes:
            raise ConfigError(
                f"bytes {start} to {last} are no range of a buffer of {self.num_bytes} bytes"
            )
        return start, last

    def _finish_work(self) -> None:
        """Waits for kernels that may still read what is about to be unmapped."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _pieces(numbers: list[int]) -> Iterator[range]:
    """Neighbouring ascending numbers together, as many as one piece may have."""
    for _, group in groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        members = [number for _, number in group]
        for start in range(members[0], members[-1] + 1, _MOST_GRANULES):
            yield range(start, min(start + _MOST_GRANULES, members[-1] + 1))


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f}"

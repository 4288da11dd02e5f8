"""The one place for memory that can be given back and taken again at the same address.

Phases of a run use the same bytes in turn (training, generation), while views of them, and later
CUDA graphs, must stay valid. So the address range is reserved once, and only the physical pages
behind it come and go.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from megachat.errors import CapacityError, ConfigError, KernelError
from megachat.parallel.device_memory import MappedDeviceBuffer, TorchAllocator
from megachat.parallel.lifetime import Owner

PAGE_BYTES = mmap.PAGESIZE
"""Unit in which physical memory comes and goes."""

LARGE_PAGE_BYTES = 2 << 20
"""A large page of x86-64 and of most others, which appears and is zeroed in one go."""

_MAP_NORESERVE = 0x4000
"""Linux's flag (Python names it from 3.13 on): no swap space is set aside for the range."""


class PhaseMemory(Protocol):
    """Memory that one phase of a run has and the next one does not."""

    def tensor(self) -> Tensor:
        """All of it, `[num_bytes]` uint8; views stay valid, their content ends with `release`."""

    def acquire(self) -> None:
        """Makes it usable; does nothing if it is."""

    def release(self) -> None:
        """Gives it back."""

    def resident_bytes(self) -> int:
        """Bytes that are taken now."""

    def close(self) -> None:
        """Gives memory and, once the last view is gone, addresses back; views are void."""


def phase_memory(num_bytes: int, device: torch.device) -> PhaseMemory:
    """The kind of memory that suits a device; nothing is taken yet."""
    if device.type == "cpu":
        return AddressStableBuffer(num_bytes, device)
    if device.type == "cuda":
        return MappedDeviceBuffer(num_bytes, device)
    return ReallocatedBuffer(num_bytes, device)


def release_cached_memory(device: torch.device) -> None:
    """Hands memory that tensors have left, and torch keeps for later ones, back to the driver.

    To be called before somebody else takes memory from the driver: arena and cache at a phase
    change, the next stage's communicators at the end of a stage. It waits for the device, and
    later tensors have to ask the driver again. Does nothing on the CPU.
    """
    TorchAllocator(device).release_cached()


class ReallocatedBuffer(Owner):
    """Ordinary memory of any device, freed between phases while the views of it stay valid.

    It may come back at another address, so nothing that recorded an address outlives a phase.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Allocates, to learn at once whether it fits, and gives the memory back."""
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.release()

    def tensor(self) -> Tensor:
        """The whole buffer, `[num_bytes]` uint8."""
        return self._bytes

    def acquire(self) -> None:
        """Allocates; what is in the memory is undefined.

        Raises:
            PhaseError: The buffer was closed.
        """
        self.check_open()
        if not self.resident_bytes():
            self._bytes.untyped_storage().resize_(self._bytes.nbytes)

    def release(self) -> None:
        """Frees the memory."""
        self._bytes.untyped_storage().resize_(0)

    def resident_bytes(self) -> int:
        """Size of the allocation."""
        return self._bytes.untyped_storage().nbytes()

    def _end(self) -> None:
        self.release()


class AddressStableBuffer(Owner):
    """A range of addresses whose physical pages appear at the first write and can be released.

    On the CPU an anonymous private mapping: a new page reads as zero, costs nothing until it is
    written, and `release` shows in the resident set of the process. Reserving far more than the
    machine has is fine, which is what dry runs of large models do.
    """

    def __init__(self, num_bytes: int, device: torch.device, *, large_pages: bool = False) -> None:
        """Reserves addresses; takes no memory.

        Args:
            num_bytes: Size, rounded up to whole pages.
            device: Where the memory is.
            large_pages: Whether what is acquired will all be written, so that large pages waste
                nothing: they cost a fraction of the faults, and of the misses in the table of
                addresses, of small ones.

        Raises:
            ConfigError: The size is not positive.
            KernelError: There is no such memory on this kind of device.
            CapacityError: The address space is exhausted.
        """
        if num_bytes <= 0:
            raise ConfigError(f"a buffer needs at least 1 byte, {num_bytes} were asked for")
        if device.type != "cpu":
            raise KernelError(
                f"this kind of address-stable memory exists on cpu, not on {device}: use "
                "phase_memory, which chooses by the device"
            )
        self.device = device
        self.num_bytes = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            self._pages = mmap.mmap(-1, self.num_bytes, flags=flags)
        except OSError as error:
            raise CapacityError(
                f"cannot reserve {self.num_bytes} bytes of addresses ({error.strerror}): lower the "
                "size of the pool or raise the limit on virtual memory (ulimit -v)"
            ) from error
        self._large_pages = large_pages
        # The tensor keeps the mapping alive, which ends with the last view of it.
        self._bytes = torch.frombuffer(self._pages, dtype=torch.uint8)

    @property
    def address(self) -> int:
        """First address; never changes."""
        return self._bytes.data_ptr()

    def tensor(self) -> Tensor:
        """The whole buffer, `[num_bytes]` uint8; views of it stay valid for good."""
        return self._bytes

    def acquire(self, start: int = 0, stop: int | None = None) -> None:
        """Lets pages come as they are written: large ones, if asked for, where whole ones fit.

        Raises:
            ConfigError: The range does not lie within the buffer.
            PhaseError: The buffer was closed.
        """
        self.check_open()
        first, last = self._page_range(start, self.num_bytes if stop is None else stop)
        if self._large_pages:
            origin = self.address % LARGE_PAGE_BYTES  # they start at multiples of their size
            first = -(-(first + origin) // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES - origin
            last = (last + origin) // LARGE_PAGE_BYTES * LARGE_PAGE_BYTES - origin
            if last > first:
                with contextlib.suppress(OSError):  # a system without them
                    self._pages.madvise(mmap.MADV_HUGEPAGE, first, last - first)

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Gives the pages that lie wholly within a range of bytes back; they read as zero then.

        Args:
            start: First byte of the range.
            stop: First byte after it; None means the end of the buffer.

        Raises:
            ConfigError: The range does not lie within the buffer.
        """
        first, last = self._page_range(start, self.num_bytes if stop is None else stop)
        if last > first:  # nothing is left of a closed one
            self._pages.madvise(mmap.MADV_DONTNEED, first, last - first)

    def resident_bytes(self, start: int = 0, stop: int | None = None) -> int:
        """Bytes of physical memory behind the pages that lie wholly within a range.

        Raises:
            ConfigError: The range does not lie within the buffer.
        """
        first, last = self._page_range(start, self.num_bytes if stop is None else stop)
        if last <= first:
            return 0
        resident = (ctypes.c_ubyte * ((last - first) // PAGE_BYTES))()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(
            ctypes.c_void_p(self.address + first), ctypes.c_size_t(last - first), resident
        ):
            raise OSError(ctypes.get_errno(), "mincore failed")
        flags = torch.frombuffer(resident, dtype=torch.uint8)
        return int((flags & 1).sum()) * PAGE_BYTES

    def _end(self) -> None:
        """Gives all pages back; the mapping ends with the last view of it."""
        self.release()
        self.num_bytes = 0
        self._bytes = self._bytes.new_empty(0)
        del self._pages

    def _page_range(self, start: int, stop: int) -> tuple[int, int]:
        """The whole pages within a range of bytes, as bytes."""
        if not 0 <= start <= stop <= self.num_bytes:
            raise ConfigError(
                f"bytes {start} to {stop} are no range of a buffer of {self.num_bytes} bytes"
            )
        return -(-start // PAGE_BYTES) * PAGE_BYTES, stop // PAGE_BYTES * PAGE_BYTES


class MovableTensors:
    """Tensors whose memory leaves the device while nothing reads them; views of them stay valid.

    Whole storages move, one after the other, so that the device has room as soon as the first one
    has left. The host's copies are kept for the next time: pinning memory costs more than copying.
    """

    def __init__(self, tensors: Iterable[Tensor], *, constant: bool = False) -> None:
        """Notes the storages; moves nothing.

        Args:
            tensors: They share their storages with nothing that is used while they are away.
            constant: Nobody writes to them, so that they travel to the host once.
        """
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        self._storages = list(storages.values())
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._constant = constant
        self._host: list[Tensor] = []
        self._are_away = False

    @property
    def num_bytes(self) -> int:
        """Of all storages, wherever they are."""
        return sum(self._sizes)

    @property
    def device_bytes(self) -> int:
        """Bytes that are taken on the device now."""
        return sum(storage.nbytes() for storage in self._storages)

    def holds_what(self, other: "MovableTensors") -> bool:
        """Whether both are about the same memory."""
        mine, theirs = self._storages, other._storages
        return [storage._cdata for storage in mine] == [storage._cdata for storage in theirs]

    def to_host(self) -> None:
        """Copies the content to the host and frees the device's memory; does nothing if away."""
        if self._are_away:
            return
        is_known = self._constant and bool(self._host)
        if not self._host:
            self._host = [_host_copy(storage) for storage in self._storages]
        for storage, copy in zip(self._storages, self._host, strict=True):
            if not is_known:
                copy.copy_(_bytes_of(storage))
            storage.resize_(0)
        self._are_away = True

    def discard(self) -> None:
        """Frees the device's memory and forgets the content; does nothing if away."""
        if not self._are_away:
            for storage in self._storages:
                storage.resize_(0)
            self._are_away = True

    def restore(self) -> None:
        """Takes the memory again: with the content if `to_host` freed it, with zeros otherwise."""
        if not self._are_away:
            return
        for index, (storage, size) in enumerate(zip(self._storages, self._sizes, strict=True)):
            storage.resize_(size)
            if self._host:
                _bytes_of(storage).copy_(self._host[index])
            else:
                _bytes_of(storage).zero_()
        self._are_away = False


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """`[num_bytes]` uint8, a view."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _host_copy(storage: torch.UntypedStorage) -> Tensor:
    """Host memory for the content of a storage, pinned where that makes its way shorter."""
    return torch.empty(
        storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda"
    )

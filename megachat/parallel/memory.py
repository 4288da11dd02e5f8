"""The one place for memory that can be given back and taken again at the same address.

Phases of a run use the same bytes in turn (training, generation), while views of them, and later
CUDA graphs, must stay valid. So the address range is reserved once, and only the physical pages
behind it come and go.
"""

import ctypes
import mmap
from typing import Protocol

import torch
from torch import Tensor

from megachat.errors import CapacityError, ConfigError, KernelError

PAGE_BYTES = mmap.PAGESIZE
"""Unit in which physical memory comes and goes."""

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


def phase_memory(num_bytes: int, device: torch.device) -> PhaseMemory:
    """The kind of memory that suits a device; nothing is taken yet."""
    if device.type == "cpu":
        return AddressStableBuffer(num_bytes, device)
    return ReallocatedBuffer(num_bytes, device)


class ReallocatedBuffer:
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
        """Allocates; what is in the memory is undefined."""
        if not self.resident_bytes():
            self._bytes.untyped_storage().resize_(self._bytes.nbytes)

    def release(self) -> None:
        """Frees the memory."""
        self._bytes.untyped_storage().resize_(0)

    def resident_bytes(self) -> int:
        """Size of the allocation."""
        return self._bytes.untyped_storage().nbytes()


class AddressStableBuffer:
    """A range of addresses whose physical pages appear at the first write and can be released.

    On the CPU an anonymous private mapping: a new page reads as zero, costs nothing until it is
    written, and `release` shows in the resident set of the process. Reserving far more than the
    machine has is fine, which is what dry runs of large models do.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Reserves addresses; takes no memory.

        Args:
            num_bytes: Size, rounded up to whole pages.
            device: Where the memory is.

        Raises:
            ConfigError: The size is not positive.
            KernelError: There is no such memory on this kind of device.
            CapacityError: The address space is exhausted.
        """
        if num_bytes <= 0:
            raise ConfigError(f"a buffer needs at least 1 byte, {num_bytes} were asked for")
        if device.type != "cpu":
            raise KernelError(
                f"address-stable memory exists on cpu, not on {device}: keep this pool in ordinary "
                "memory of the device"
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
        # The tensor keeps the mapping alive, which ends with the last view of it.
        self._bytes = torch.frombuffer(self._pages, dtype=torch.uint8)

    @property
    def address(self) -> int:
        """First address; never changes."""
        return self._bytes.data_ptr()

    def tensor(self) -> Tensor:
        """The whole buffer, `[num_bytes]` uint8; views of it stay valid for good."""
        return self._bytes

    def acquire(self) -> None:
        """Does nothing: a page comes when it is written."""

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Gives the pages that lie wholly within a range of bytes back; they read as zero then.

        Args:
            start: First byte of the range.
            stop: First byte after it; None means the end of the buffer.

        Raises:
            ConfigError: The range does not lie within the buffer.
        """
        first, last = self._page_range(start, self.num_bytes if stop is None else stop)
        if last > first:
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

    def _page_range(self, start: int, stop: int) -> tuple[int, int]:
        """The whole pages within a range of bytes, as bytes."""
        if not 0 <= start <= stop <= self.num_bytes:
            raise ConfigError(
                f"bytes {start} to {stop} are no range of a buffer of {self.num_bytes} bytes"
            )
        return -(-start // PAGE_BYTES) * PAGE_BYTES, stop // PAGE_BYTES * PAGE_BYTES

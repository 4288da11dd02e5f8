"""Models who takes a GPU's memory: a driver of finite capacity and torch's caching allocator on it.

The allocator is a plain copy of the rules in torch's `c10/cuda/CUDACachingAllocator.cpp` (constants
in `c10/core/AllocatorConfig.h`, torch 2.13) for one stream and default settings, without and with
expandable segments. The driver hands out whole granules, to the allocator and, through the calls
that `MappedDeviceBuffer` makes, to arena and cache. Nothing here touches memory: it counts.
"""

import ctypes
import mmap
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass
from typing import Any

from megachat.errors import CapacityError, KernelError

MIB = 1 << 20
GRANULE_BYTES = 2 * MIB
"""Smallest unit of physical memory that drivers for present GPUs give (assumed, not asked for)."""

MIN_BLOCK_BYTES = 512
SMALL_BYTES = MIB
"""Largest request that the small pool serves."""
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
"""Segment for requests below 10 MiB, and the page of an expandable segment."""
MIN_LARGE_BYTES = 10 * MIB
"""Requests from here on get a segment of their own size."""
ROUND_LARGE_BYTES = 2 * MIB

_ADDRESS_SPACE = LARGE_SEGMENT_BYTES << 20
"""Of an expandable segment, in pages; torch reserves 1.125 times the memory of the device."""


class ModelDriver:
    """Counts the granules of one device; stands where `CudaDriver` does."""

    def __init__(self, capacity_bytes: int) -> None:
        """An empty device."""
        self.capacity_bytes = capacity_bytes // GRANULE_BYTES * GRANULE_BYTES
        self.segment_bytes = 0
        """What torch's allocator has."""
        self.mapped_bytes = 0
        """What is mapped behind reserved addresses."""
        self.peak_bytes = 0
        """Most that both had at once since `restart`."""
        self.calls: Counter[str] = Counter()
        """Functions called since `restart`; those of the allocator by their names, too."""
        self._reserved: list[mmap.mmap] = []

    @property
    def used_bytes(self) -> int:
        """What everybody has."""
        return self.segment_bytes + self.mapped_bytes

    @property
    def free_bytes(self) -> int:
        """What nobody has."""
        return self.capacity_bytes - self.used_bytes

    def restart(self) -> None:
        """Counts calls and the peak anew."""
        self.calls.clear()
        self.peak_bytes = self.used_bytes

    def take_segment(self, num_bytes: int, *, calls: tuple[str, ...]) -> bool:
        """Gives the allocator memory; False where there is not enough."""
        self.calls.update(calls)
        if num_bytes > self.free_bytes:
            return False
        self.segment_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return True

    def return_segment(self, num_bytes: int, *, calls: tuple[str, ...]) -> None:
        """Takes memory of the allocator back."""
        self.calls.update(calls)
        self.segment_bytes -= num_bytes

    def call(self, name: str, *arguments: Any) -> None:
        """One of the functions that `MappedDeviceBuffer` calls, with its ctypes arguments.

        Raises:
            CapacityError: There is no granule left.
            KernelError: There is no such function here.
        """
        self.calls[name] += 1
        if name == "cuMemGetAllocationGranularity":
            _value_behind(arguments[0]).value = GRANULE_BYTES
        elif name == "cuMemAddressReserve":
            _value_behind(arguments[0]).value = self._reserve(arguments[1].value)
        elif name == "cuMemGetInfo_v2":
            _value_behind(arguments[0]).value = self.free_bytes
            _value_behind(arguments[1]).value = self.capacity_bytes
        elif name == "cuMemCreate":
            if arguments[1].value > self.free_bytes:
                raise CapacityError(f"{name}: the modelled device is out of memory")
            self.mapped_bytes += arguments[1].value
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        elif name == "cuMemUnmap":
            self.mapped_bytes -= arguments[1].value
        elif name not in ("cuMemMap", "cuMemRelease", "cuMemSetAccess", "cuMemAddressFree"):
            raise KernelError(f"{name} is not modelled: add it to tools/allocator_model.py")

    def _reserve(self, num_bytes: int) -> int:
        """Real addresses, so that tensors can lie there, behind which no memory ever appears."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        self._reserved.append(mmap.mmap(-1, num_bytes, flags=flags))
        return ctypes.addressof(ctypes.c_char.from_buffer(self._reserved[-1]))


def _value_behind(reference: Any) -> Any:
    """What `ctypes.byref` refers to."""
    return reference._obj


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of a segment: used by one tensor, free, or without memory behind it."""

    address: int
    num_bytes: int
    is_small: bool
    is_expandable: bool
    is_free: bool = True
    is_mapped: bool = True
    previous: "Block | None" = None
    next: "Block | None" = None


_Entry = tuple[int, int, Block]
"""Size, address, block: torch's order of free blocks. No two have one address."""


class CachingAllocatorModel:
    """torch's allocator of one device and one stream."""

    def __init__(self, driver: ModelDriver, *, expandable: bool = False) -> None:
        """Takes nothing.

        Args:
            driver: Who has the memory.
            expandable: As `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`.
        """
        self._driver = driver
        self._expandable = expandable
        self._free: dict[bool, list[_Entry]] = {True: [], False: []}
        self._unmapped: dict[bool, list[tuple[int, Block]]] = {True: [], False: []}
        self._next_address = _ADDRESS_SPACE
        self._used = 0

    def used_bytes(self) -> int:
        """Bytes of blocks that tensors have, rounding included."""
        return self._used

    def reserved_bytes(self) -> int:
        """Bytes taken from the driver."""
        return self._driver.segment_bytes

    def cached_bytes(self) -> int:
        """Bytes taken from the driver that no tensor uses."""
        return self.reserved_bytes() - self._used

    def allocate(self, num_bytes: int) -> Block:
        """Memory for a tensor of at least one byte.

        Raises:
            CapacityError: The driver has none left, also after everything that is cached and can
                go back has gone back.
        """
        size = rounded(num_bytes)
        is_small = size <= SMALL_BYTES
        block = self._best_fit(size, is_small=is_small) or self._new_block(size, is_small=is_small)
        if block is None:
            self._return_cached()
            block = self._new_block(size, is_small=is_small)
        if block is None:
            raise CapacityError(
                f"torch's allocator wants {num_bytes / 1e9:.2f} GB for a tensor: tensors take "
                f"{self._used / 1e9:.2f} GB, {self.cached_bytes() / 1e9:.2f} GB are in fragments, "
                f"{self._driver.mapped_bytes / 1e9:.2f} GB are mapped and "
                f"{self._driver.free_bytes / 1e9:.2f} of {self._driver.capacity_bytes / 1e9:.2f} "
                "GB are free"
            )
        self._split(block, size)
        block.is_free = False
        self._used += block.num_bytes
        return block

    def free(self, block: Block) -> None:
        """Keeps the memory of a tensor for later ones."""
        self._used -= block.num_bytes
        block.is_free = True
        self._insert(self._merged(block))

    def release_cached(self) -> None:
        """`torch.cuda.empty_cache`."""
        self._return_cached()

    def _return_cached(self) -> None:
        """Free segments, or free pages of expandable ones, go back to the driver."""
        for entries in self._free.values():
            for _, _, block in list(entries):
                if block.is_expandable:
                    self._unmap_pages(block)
                elif block.previous is None and block.next is None:
                    self._remove(block)
                    self._driver.return_segment(block.num_bytes, calls=("cudaFree",))

    def _best_fit(self, size: int, *, is_small: bool) -> Block | None:
        """The smallest free block that is large enough; of equal ones the first."""
        entries = self._free[is_small]
        at = bisect_left(entries, size, key=lambda entry: entry[0])
        if at == len(entries):
            return None
        while at + 1 < len(entries) and entries[at][2].is_expandable:
            # A block that can grow counts with what it can grow to.
            if _reach(entries[at + 1][2]) >= _reach(entries[at][2]):
                break
            at += 1
        return entries.pop(at)[2]

    def _new_block(self, size: int, *, is_small: bool) -> Block | None:
        """A free block from the driver, out of the list of free ones; None where it has none."""
        if self._expandable:
            return self._grown(size, is_small=is_small)
        segment = segment_bytes(size)
        if not self._driver.take_segment(segment, calls=("cudaMalloc",)):
            return None
        self._next_address += segment + GRANULE_BYTES
        return Block(self._next_address - segment, segment, is_small, is_expandable=False)

    def _grown(self, size: int, *, is_small: bool) -> Block | None:
        """Memory at the end of an expandable segment, or in a hole of it."""
        block = self._room(size, is_small=is_small)
        if not block.is_mapped:
            mapped = self._map_pages(block, min(block.num_bytes, size))
            if mapped is None:
                return None
            block = mapped
        while block.num_bytes < size:
            assert block.next is not None, "there is room"
            mapped = self._map_pages(block.next, min(size - block.num_bytes, block.next.num_bytes))
            if mapped is None:
                return None
            block = mapped
        self._remove(block)
        return block

    def _room(self, size: int, *, is_small: bool) -> Block:
        """The first run of unmapped and free blocks of enough addresses."""
        for _, unmapped in self._unmapped[is_small]:
            first = unmapped
            if first.previous is not None and first.previous.is_free:
                first = first.previous
            found = 0
            at: Block | None = first
            while found < size and at is not None and at.is_free:
                found, at = found + at.num_bytes, at.next
            if found >= size:
                return first
        address = -(-self._next_address // _ADDRESS_SPACE) * _ADDRESS_SPACE
        self._next_address = address + _ADDRESS_SPACE
        block = Block(address, _ADDRESS_SPACE, is_small, is_expandable=True, is_mapped=False)
        self._note_unmapped(block)
        return block

    def _map_pages(self, block: Block, size: int) -> Block | None:
        """Memory behind the start of an unmapped block; returns the free block it is part of."""
        page = _page(block.is_small)
        size = -(-size // page) * page  # unmapped blocks begin and end with pages
        calls = ("cuMemCreate", "cuMemMap") * (size // page) + ("cuMemSetAccess",)
        if not self._driver.take_segment(size, calls=calls):
            return None
        self._forget_unmapped(block)
        block.is_mapped = True
        if size < block.num_bytes:
            rest = self._cut(block, size)
            rest.is_mapped = False
            self._note_unmapped(rest)
        block = self._merged(block)
        self._insert(block)
        return block

    def _unmap_pages(self, block: Block) -> None:
        """Whole pages within a free block of an expandable segment go back to the driver."""
        page = _page(block.is_small)
        first = -(-block.address // page) * page
        last = (block.address + block.num_bytes) // page * page
        if last <= first:
            return
        self._remove(block)
        if first > block.address:
            rest = self._cut(block, first - block.address)
            self._insert(block)
            block = rest
        if last < block.address + block.num_bytes:
            self._insert(self._cut(block, last - block.address))
        calls = ("cuMemUnmap", "cuMemRelease") * (block.num_bytes // page)
        self._driver.return_segment(block.num_bytes, calls=calls)
        block.is_mapped = False
        self._note_unmapped(self._merged(block))

    def _split(self, block: Block, size: int) -> None:
        """Cuts what a request does not need off a block, if it is worth it."""
        rest = block.num_bytes - size
        splits_fine = block.is_small or self._expandable
        if rest >= MIN_BLOCK_BYTES if splits_fine else rest > SMALL_BYTES:
            self._insert(self._cut(block, size))

    def _cut(self, block: Block, size: int) -> Block:
        """Shortens a block; returns the free rest, which is in no list."""
        rest = Block(
            block.address + size,
            block.num_bytes - size,
            block.is_small,
            block.is_expandable,
            is_mapped=block.is_mapped,
            previous=block,
            next=block.next,
        )
        if block.next is not None:
            block.next.previous = rest
        block.next, block.num_bytes = rest, size
        return rest

    def _merged(self, block: Block) -> Block:
        """A free or unmapped block with the neighbours that are the same; in no list."""
        for first, second in ((block.previous, block), (block, block.next)):
            if first is None or second is None:
                continue
            other = first if first is not block else second
            if not other.is_free or other.is_mapped is not block.is_mapped:
                continue
            if other.is_mapped:
                self._remove(other)
            else:
                self._forget_unmapped(other)
            first.num_bytes += second.num_bytes
            first.next = second.next
            if second.next is not None:
                second.next.previous = first
            block = first
            block.is_free = True
            return self._merged(block)
        return block

    def _insert(self, block: Block) -> None:
        insort(
            self._free[block.is_small],
            (block.num_bytes, block.address, block),
            key=lambda entry: entry[:2],
        )

    def _remove(self, block: Block) -> None:
        entries = self._free[block.is_small]
        at = bisect_left(entries, (block.num_bytes, block.address), key=lambda entry: entry[:2])
        assert entries[at][2] is block
        del entries[at]

    def _note_unmapped(self, block: Block) -> None:
        insort(self._unmapped[block.is_small], (block.address, block), key=lambda entry: entry[0])

    def _forget_unmapped(self, block: Block) -> None:
        entries = self._unmapped[block.is_small]
        at = bisect_left(entries, block.address, key=lambda entry: entry[0])
        assert entries[at][1] is block
        del entries[at]


def rounded(num_bytes: int) -> int:
    """Size of the block for a request."""
    return max(1, -(-num_bytes // MIN_BLOCK_BYTES)) * MIN_BLOCK_BYTES


def segment_bytes(size: int) -> int:
    """Size of the segment that a block is cut from if no free one fits."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


def _page(is_small: bool) -> int:
    return SMALL_SEGMENT_BYTES if is_small else LARGE_SEGMENT_BYTES


def _reach(block: Block) -> int:
    """What a free block is, or can grow to."""
    following = block.next
    return block.num_bytes + (following.num_bytes if following and not following.is_mapped else 0)

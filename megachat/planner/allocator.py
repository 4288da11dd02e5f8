"""Says how much memory torch's caching allocator takes for tensors of given sizes. Pure.

The rules are those of torch 2's `c10/cuda/CUDACachingAllocator`. A request is rounded up to 512
bytes. One of at most 1 MiB is cut from a segment of 2 MiB, one below 10 MiB from a segment of
20 MiB; a larger one gets a segment of its own, of a multiple of 2 MiB. Segments come from the
driver and stay with the allocator until it runs out of memory or is told to give free ones back.

For many tensors of one size that makes a bound: what a segment's last tensor leaves is counted as
lost. In truth smaller tensors may still find room there. What a mixture of sizes strands beyond it,
when a small tensor outlives the large ones beside it, follows from no rule. It matters where memory
has to go back to the driver, as it does before generation; `STRANDED_BYTES` is planned there.
"""

from collections.abc import Iterable

MIB = 2**20
_UNIT = 512
_SMALL, _LARGE = MIB, 10 * MIB
"""Largest request that is served from a small segment; first one with a segment of its own."""
_SMALL_SEGMENT, _LARGE_SEGMENT, _GRANULE = 2 * MIB, 20 * MIB, 2 * MIB

PARTLY_USED_BYTES = _SMALL_SEGMENT + _LARGE_SEGMENT
"""Of the last segment of each kind, which is not full."""

STRANDED_BYTES = 768 * MIB
"""Of segments that training has left and a living tensor keeps. Rehearsals of OPT-66B and OPT-175B
on 64 GPUs, over a model of the allocator, took 0.6 and 0.5 GB more than the bound (the figures are
in `docs/decisions/0012-device-memory.md`)."""

_TEMPORARIES = 8
"""Tensors of a phase's workspace that live at one moment and have segments of their own (counted in
the code of the layers: the most are in a layer's backward pass)."""


def reserved_bytes(num_bytes: int) -> int:
    """What a tensor takes of its segment, at most, among others of its size."""
    if num_bytes <= 0:
        return 0
    rounded = -(-num_bytes // _UNIT) * _UNIT
    if rounded <= _SMALL:
        return _SMALL_SEGMENT // (_SMALL_SEGMENT // rounded)
    if rounded < _LARGE:
        return _LARGE_SEGMENT // (_LARGE_SEGMENT // rounded)
    return -(-rounded // _GRANULE) * _GRANULE


def rounding(sizes: Iterable[int]) -> int:
    """Bytes that tensors of these sizes take beyond their own."""
    return sum(reserved_bytes(size) - size for size in sizes)


def workspace_rounding() -> int:
    """The same of a phase's temporaries, whose sizes are not listed one by one."""
    return _TEMPORARIES * _GRANULE + PARTLY_USED_BYTES

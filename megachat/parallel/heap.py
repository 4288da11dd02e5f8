"""The one place that tells the C library what to do with the memory that tensors leave.

glibc maps a large tensor of its own and unmaps it when it is freed, or returns the end of the heap.
The next tensor then gets pages that the system has to find and to zero: in a PPO step on CPUs a
quarter of all processor time (docs/measurements/ppo_step.md). So it keeps what is freed within a
stage, and gives all of it back between two stages.
"""

import ctypes
import logging

_LOG = logging.getLogger(__name__)

KEPT_BYTES = 2**31 - 1
"""Of free memory at the end of the heap; what is more goes back to the system."""
_LARGEST = 2**30
"""Bytes of a tensor that comes from the heap; larger ones are mapped, and go back when freed."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of <malloc.h>."""


def keep_freed_memory() -> bool:
    """Lets this process use freed memory again instead of asking the system for new pages.

    Returns:
        Whether the C library knows how; others than glibc do not.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        _LOG.info("this system's C library cannot be told to keep freed memory")
        return False
    return all(
        library.mallopt(setting, value) == 1
        for setting, value in ((_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, KEPT_BYTES))
    )


def return_freed_memory() -> None:
    """Gives the pages of all memory that this process has freed back to the system.

    Does nothing where the C library does not know how.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)

"""The one place for sums over a tensor group whose ranks share a machine's memory: `SharedSum`.

A decode step on CPUs sums some kilobytes twice a layer. gloo sends them through sockets, which can
take longer than the products in between; ranks of one machine can read each other's messages
where they lie. Results are the same bits on all ranks.
"""

import contextlib
import logging
import mmap
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megachat.errors import KernelError
from megachat.ops import cpu_kernels
from megachat.ops.registry import Backend
from megachat.parallel import GROUP_TIMEOUT
from megachat.parallel.collectives import all_gather_objects, all_reduce_sum, broadcast_object

_LOG = logging.getLogger(__name__)

PLACE_BYTES = 1 << 20
"""Of a message; longer ones are summed piece by piece."""
_SHARED_MEMORY = Path("/dev/shm")
_TOKEN_BYTES = 16

GroupSum = Callable[[Tensor], Tensor]
"""Sums a tensor over a group, in place, and returns it; a collective call."""


def group_sum(group: ProcessGroup, backend: Backend) -> GroupSum:
    """The fastest sum over a group: through shared memory where that can be; a collective call.

    Args:
        group: The tensor group.
        backend: Who computes; shared memory belongs to the CPU kernels.
    """
    if group.size() > 1 and backend is Backend.CPU:
        region = _shared_region(group)
        if region is not None:
            return SharedSum(group, region)
        _LOG.info("a tensor group is spread over machines: its sums go through the network")
    return partial(all_reduce_sum, group=group)


class SharedSum:
    """Sums float32 or bfloat16 tensors of a group through memory that all its ranks have mapped."""

    def __init__(self, group: ProcessGroup, region: mmap.mmap) -> None:
        """Takes a region over.

        Args:
            group: Whose ranks share it.
            region: Zeros, of the size that `cpu_kernels.all_reduce_bytes` says.
        """
        self._rank, self._ranks = group.rank(), group.size()
        self._memory = torch.frombuffer(region, dtype=torch.uint8)  # keeps the mapping
        self._calls = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Sums a tensor in place; a collective call, made by all ranks in the same order.

        Raises:
            KernelError: It is of a kind that the kernel cannot read, or a rank does not come.
        """
        cpu_kernels.check_tensors("all_reduce", [tensor])
        for part in tensor.view(-1).split(PLACE_BYTES // tensor.element_size()):  # type: ignore[no-untyped-call]
            self._sum(part)
        return tensor

    def _sum(self, part: Tensor) -> None:
        call, self._calls = self._calls, self._calls + 1
        sizes = {"ranks": self._ranks, "place_bytes": PLACE_BYTES, "call": call}
        cpu_kernels.all_reduce_post(part, self._memory, rank=self._rank, **sizes)
        started = time.monotonic()
        while (missing := cpu_kernels.all_reduce_collect(part, self._memory, **sizes)) >= 0:
            if time.monotonic() - started > GROUP_TIMEOUT.total_seconds():
                raise KernelError(
                    f"rank {missing} of {self._ranks} did not come to sum {call} within "
                    f"{GROUP_TIMEOUT}: look for its own message"
                )


def _shared_region(group: ProcessGroup) -> mmap.mmap | None:
    """Memory of all ranks of a group, or None on all of them where some cannot reach it."""
    size = cpu_kernels.all_reduce_bytes(ranks=group.size(), place_bytes=PLACE_BYTES)
    token = uuid.uuid4().bytes
    path, mine = None, None
    if group.rank() == 0:
        with contextlib.suppress(OSError):
            path, mine = _create(size, token)
    named = broadcast_object((path, token), group)
    if group.rank() > 0 and named[0] is not None:
        with contextlib.suppress(OSError, ValueError):
            mine = _open(Path(named[0]), size, named[1])
    found = all_gather_objects(mine is not None, group)
    if path is not None:
        Path(path).unlink()  # the memory stays for as long as somebody has mapped it
    return mine if all(found) else None


def _create(size: int, token: bytes) -> tuple[str, mmap.mmap]:
    """A file of zeros behind a token."""
    folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    handle, path = tempfile.mkstemp(prefix="megachat-sum-", dir=folder)
    try:
        # Reserved now: a full file system would otherwise kill whoever writes there.
        os.posix_fallocate(handle, 0, size + _TOKEN_BYTES)
        os.pwrite(handle, token, size)
        return path, mmap.mmap(handle, size)
    except OSError:
        Path(path).unlink()
        raise
    finally:
        os.close(handle)


def _open(path: Path, size: int, token: bytes) -> mmap.mmap | None:
    """Maps the file that another rank made; None if this is another one of the same name."""
    with path.open("r+b") as file:
        if os.pread(file.fileno(), _TOKEN_BYTES, size) != token:
            return None
        return mmap.mmap(file.fileno(), size)

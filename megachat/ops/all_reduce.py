"""The one place for sums over a tensor group that reaches memory in common: `SharedSum`, `PeerSum`.

A decode step sums some kilobytes twice a layer. gloo sends them through sockets, which can take
longer than the products in between; ranks of one machine can read each other's messages where they
lie, in its memory or in that of its GPUs. Results are the same bits on all ranks.
"""

import logging
import mmap
import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megachat.errors import KernelError
from megachat.ops import cpu_kernels, cuda_kernels, peer_memory
from megachat.ops.registry import Backend, CudaKernel, define
from megachat.parallel import GROUP_TIMEOUT
from megachat.parallel.collectives import all_reduce_sum
from megachat.parallel.lifetime import Owner

_LOG = logging.getLogger(__name__)

PLACE_BYTES = 1 << 20
"""Of a message in shared memory; longer ones are summed piece by piece."""


class GroupSum(Protocol):
    """Sums over a group."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """Sums a tensor in place and returns it; a collective call."""

    def close(self) -> None:
        """Lets go of what it shares with other ranks; sends nothing."""


def group_sum(group: ProcessGroup, backend: Backend, *, device: torch.device) -> GroupSum:
    """The fastest sum over a group: through memory in common where that can be.

    A collective call.

    Args:
        group: The tensor group.
        backend: Who computes: shared memory belongs to the CPU kernels, memory of other GPUs to the
            CUDA kernels.
        device: Where the tensors are.
    """
    if group.size() > 1 and backend is Backend.CPU:
        size = cpu_kernels.all_reduce_bytes(ranks=group.size(), place_bytes=PLACE_BYTES)
        region = peer_memory.share_memory(group, size)
        if region is not None:
            return SharedSum(group, region)
        _LOG.info("a tensor group is spread over machines: its sums go through the network")
    if group.size() > 1 and backend is Backend.CUDA:
        regions = _peer_regions(group, device)
        if regions is not None:
            return PeerSum(group, regions)
    return BackendSum(group)


class BackendSum(Owner):
    """Sums as the group's own backend does: gloo or NCCL."""

    def __init__(self, group: ProcessGroup) -> None:
        """Notes the group."""
        self._group = group

    def __call__(self, tensor: Tensor) -> Tensor:
        """Sums a tensor in place; a collective call."""
        return all_reduce_sum(tensor, self._group)

    def _end(self) -> None:
        """Has nothing of its own: the group ends with the layout that it belongs to."""


class SharedSum(Owner):
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
            PhaseError: The sum was closed.
        """
        self.check_open()
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

    def _end(self) -> None:
        """Unmaps the region; it lives until the last rank has."""
        self._memory = self._memory.new_empty(0)


class PeerSum(Owner):
    """Sums small tensors of GPUs that have mapped each other's memory; NCCL sums large ones.

    One launch does it all: each rank reads the whole messages of all ranks. That is little for the
    kilobytes of a decode step; the megabytes of a prompt are better cut, as NCCL does. The launch
    is an operation of torch's dispatcher, so recorded steps hold it.
    """

    def __init__(self, group: ProcessGroup, regions: Sequence[Tensor]) -> None:
        """Takes regions over.

        Args:
            group: Whose ranks share them.
            regions: As `megachat.ops.peer_memory.map_regions` returns them, of the size that
                `cuda_kernels.all_reduce_region_bytes` says.
        """
        self._group, self._regions = group, list(regions)

    def __call__(self, tensor: Tensor) -> Tensor:
        """Sums a tensor in place; a collective call, made by all ranks in the same order.

        How large a tensor is, all ranks know alike; where it starts in memory, each knows for
        itself. So one that is not in packs of 16 bytes is an error, and not a case for NCCL: ranks
        that chose differently would wait for each other for ever. The products of the CUDA kernels
        are in packs.

        Raises:
            KernelError: It is of a kind that the kernel cannot read.
            PhaseError: The sum was closed.
        """
        self.check_open()
        if tensor.nbytes > cuda_kernels.ALL_REDUCE_BYTES:
            return all_reduce_sum(tensor, self._group)
        _sum_through_peers(tensor, self._regions, self._group.rank())
        return tensor

    def _end(self) -> None:
        """Unmaps the other ranks' regions; torch frees the own one when they have done the same."""
        self._regions = []


def _peer_regions(group: ProcessGroup, device: torch.device) -> Sequence[Tensor] | None:
    """What a `PeerSum` works with, or None on all ranks, and a log line, where it cannot be had."""
    most = cuda_kernels.ALL_REDUCE_RANKS
    if group.size() > most:
        _LOG.info(
            "sums of a tensor group go through NCCL: it has %d ranks, and the kernel sums up to %d",
            *(group.size(), most),
        )
        return None
    num_bytes = cuda_kernels.all_reduce_region_bytes(device)
    return peer_memory.map_regions(group, device, num_bytes)


_sum_through_peers = define(
    "all_reduce",
    "(Tensor(a!) message, Tensor(b!)[] regions, int rank) -> ()",
    CudaKernel(launch=cuda_kernels.all_reduce, fake=lambda *_: None),
)
"""No `Op`: its result depends on what other ranks hold, so no reference can take its arguments."""

"""The one place for memory that all ranks of a tensor group reach: a machine's, or other GPUs'.

Ranks find out together whether they can have it. Where some cannot, all of them learn so.
"""

import contextlib
import logging
import mmap
import os
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megachat.parallel.collectives import all_gather_objects, broadcast_object

_LOG = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")
_TOKEN_BYTES = 16
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Names a running machine."""

_Handle = tuple[Any, ...]
"""What torch tells another process of a storage on a GPU, without the number of the GPU."""


def share_memory(group: ProcessGroup, num_bytes: int) -> mmap.mmap | None:
    """Zeros that all ranks of a group have mapped, or None on all of them where some cannot.

    A collective call.

    Args:
        group: The ranks.
        num_bytes: How many zeros.
    """
    token = uuid.uuid4().bytes
    path, mine = None, None
    if group.rank() == 0:
        with contextlib.suppress(OSError):
            path, mine = _create(num_bytes, token)
    named = broadcast_object((path, token), group)
    if group.rank() > 0 and named[0] is not None:
        with contextlib.suppress(OSError, ValueError):
            mine = _open(Path(named[0]), num_bytes, named[1])
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


def map_regions(
    group: ProcessGroup, device: torch.device, num_bytes: int
) -> Sequence[Tensor] | None:
    """Memory on the GPU of every rank, zeroed, as this rank's GPU sees it.

    A collective call. All regions are zero before the first rank returns. A region lives for as
    long as some rank keeps its tensor: torch counts them over processes.

    Args:
        group: Ranks with a CUDA device each; two may use the same.
        device: This rank's.
        num_bytes: Of a region.

    Returns:
        `[num_bytes]` uint8 of every rank, in group order; this rank's own is memory of `device`,
        the others are mapped there. None on all ranks where some cannot have that, and one log
        line says why.
    """
    places = all_gather_objects(_place(device), group)
    if not _agree(_obstacle(places, group.rank(), device), group):
        return None
    own = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    torch.cuda.current_stream(device).synchronize()  # zeros before anybody learns where they are
    offers: list[_Handle | None] = []
    problem = ""
    try:
        offers = _offers(own, group)
    except RuntimeError as error:  # of CUDA, or of an allocator that cannot share
        problem = f"torch cannot share memory of {device}: {error}"
    if not _agree(problem, group):
        return None
    handles = [offered[group.rank()] for offered in all_gather_objects(offers, group)]
    regions = []
    try:
        regions = [own if handle is None else _mapped(handle, device) for handle in handles]
    except RuntimeError as error:
        problem = f"{device} cannot map memory of another rank: {error}"
    return regions if _agree(problem, group) else None


def _place(device: torch.device) -> tuple[str, str]:
    """Names a machine and a GPU in it, whatever number a process knows it by."""
    return _BOOT_ID.read_text(encoding="ascii").strip(), _uuid(device.index)


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _obstacle(places: Sequence[tuple[str, str]], rank: int, device: torch.device) -> str:
    """What keeps a rank's GPU from reaching those of other ranks; "" for nothing."""
    numbers = {_uuid(number): number for number in range(torch.cuda.device_count())}
    own_host, own = places[rank]
    for other, (host, gpu) in enumerate(places):
        if host != own_host:
            return f"ranks {rank} and {other} are on different hosts"
        if gpu == own:
            continue
        if gpu not in numbers:
            return f"rank {rank} does not see the GPU of rank {other}"
        if not torch.cuda.can_device_access_peer(device, numbers[gpu]):
            return f"{device} of rank {rank} cannot access cuda:{numbers[gpu]} of rank {other}"
    return ""


def _agree(problem: str, group: ProcessGroup) -> bool:
    """Whether no rank has a problem; the first one is said. A collective call."""
    problems = [found for found in all_gather_objects(problem, group) if found]
    if problems:
        _LOG.info("sums of a tensor group go through NCCL: %s", problems[0])
    return not problems


def _offers(own: Tensor, group: ProcessGroup) -> list[_Handle | None]:
    """A handle of this rank's region for each other rank.

    Each gets one of its own: torch counts the users of a handle, and expects one.
    """
    storage = own.untyped_storage()
    return [
        None if rank == group.rank() else storage._share_cuda_()[1:]  # type: ignore[no-untyped-call]
        for rank in range(group.size())
    ]


def _mapped(handle: _Handle, device: torch.device) -> Tensor:
    """Another rank's region.

    As `torch.multiprocessing.reductions` rebuilds a tensor, but opened by the GPU that is going to
    read it: so it has access, and need not know the number that the other rank gives its GPU.
    """
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *handle)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)

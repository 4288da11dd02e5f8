"""Says what this machine allows a run: processes, open files, memory, room on its disks."""

import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megachat.errors import CapacityError, LaunchError, MegachatError
from megachat.parallel.launch import LaunchConfig, MemoryCheck
from megachat.planner.hardware import GB
from megachat.preflight.memory import PROCESS_BYTES
from megachat.telemetry.machine import available_bytes

_HANDLES_OF_RANK = 3
"""What a launcher holds of each rank that it starts: a pipe, a sentinel and what keeps it open."""
_HANDLES_BESIDE = 64
"""Of everything else: standard streams, modules, logs, the meeting of the nodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """A number that the system does not go beyond, and who says so."""

    value: int
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What this machine allows."""

    tasks: Limit | None
    """Processes and threads of this user together; None: nothing known bounds them."""
    open_files: int | None
    """In one process."""
    memory_bytes: int
    """Free for processes."""
    free_bytes: Callable[[Path], int]
    """Room for this user on the file system of a folder that exists."""


def this_host() -> Host:
    """What the kernel says."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Host(
        tasks=_most_tasks(),
        open_files=None if files == resource.RLIM_INFINITY else files,
        memory_bytes=available_bytes(torch.device("cpu")),
        free_bytes=_free_bytes,
    )


def check_processes(
    launch: LaunchConfig, host: Host, device: torch.device | None
) -> Iterator[MegachatError]:
    """Refuses more ranks than this node can hold, whatever they compute.

    Args:
        launch: How many.
        host: What there is.
        device: What the ranks compute on, where that is known.
    """
    if launch.world_size == 1:
        return
    tasks = launch.processes * launch.threads_per_process
    if host.tasks is not None and tasks > host.tasks.value:
        yield LaunchError(
            f"launch.processes {launch.processes} x {launch.threads_per_process} threads make "
            f"{tasks}, but this host allows {host.tasks.value} ({host.tasks.source}): lower "
            "launch.processes or launch.threads"
        )
    handles = _HANDLES_OF_RANK * launch.processes + launch.world_size + _HANDLES_BESIDE
    if host.open_files is not None and handles > host.open_files:
        yield LaunchError(
            f"launch.processes {launch.processes} on launch.nodes {launch.nodes} take {handles} "
            f"open files in the process that starts and connects them, but {host.open_files} are "
            "allowed here: lower them, or raise the limit (ulimit -n)"
        )
    needed = launch.processes * PROCESS_BYTES
    checks_memory = launch.memory_check is MemoryCheck.REFUSE
    on_cpu = device is not None and device.type == "cpu"
    if checks_memory and on_cpu and needed > host.memory_bytes:
        yield CapacityError(
            f"launch.processes {launch.processes} take {needed / GB:.1f} GB before they hold any "
            f"tensor, but {host.memory_bytes / GB:.1f} GB are free here: lower launch.processes "
            '(launch.memory_check = "warn" starts them anyway)'
        )


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    path = path.absolute()
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def _free_bytes(folder: Path) -> int:
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


def _most_tasks() -> Limit | None:
    """The lowest bound on processes and threads that the system tells of."""
    found = [
        Limit(value=int(text), source=str(path))
        for path in (
            Path("/proc/sys/kernel/pid_max"),
            Path("/proc/sys/kernel/threads-max"),
            Path("/sys/fs/cgroup/pids.max"),
        )
        if path.is_file() and (text := path.read_text(encoding="ascii").strip()).isdecimal()
    ]
    mine, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if mine != resource.RLIM_INFINITY and os.geteuid() != 0:  # root is not bound by it
        found.append(Limit(value=mine, source="ulimit -u"))
    return min(found, key=lambda limit: limit.value, default=None)

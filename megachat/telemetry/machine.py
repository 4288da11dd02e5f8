"""The one place that says on what a run ran: versions of what it used and the machine."""

import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("megachat", "torch", "megatron-core", "deepspeed", "transformers", "datasets", "numpy")
CPU_INFO = Path("/proc/cpuinfo")
MEMORY_INFO = Path("/proc/meminfo")
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Of a container, by control groups of version 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One line of a description."""

    name: str
    value: str


def machine_facts() -> tuple[Fact, ...]:
    """The machine of this process, as it sees itself."""
    return (
        Fact(name="System", value=f"{platform.system()} {platform.release()} {platform.machine()}"),
        Fact(name="Processor", value=processor_name(CPU_INFO)),
        Fact(name="Cores usable", value=str(len(os.sched_getaffinity(0)))),
        Fact(name="Memory", value=f"{_memory_bytes() / 2**30:.1f} GiB"),
        Fact(name="GPUs", value=_gpus()),
    )


def version_facts(packages: Iterable[str] = PACKAGES) -> tuple[Fact, ...]:
    """Versions of Python and of the packages that decide what a run computes."""
    python = Fact(name="python", value=".".join(map(str, sys.version_info[:3])))
    return (python, *(Fact(name=name, value=_version(name)) for name in packages))


def processor_name(cpu_info: Path) -> str:
    """The model name in a file of Linux's /proc/cpuinfo format, else the architecture."""
    if cpu_info.is_file():
        for line in cpu_info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, separator, value = line.partition(":")
            if separator and name.strip() == "model name":
                return value.strip()
    return platform.machine()


def available_bytes(
    device: torch.device, *, info: Path = MEMORY_INFO, limit: Path = MEMORY_LIMIT
) -> int:
    """Memory that a job could have: all of a CUDA device, or what is free on this machine.

    Args:
        device: Where the job's tensors would be.
        info: A file of Linux's /proc/meminfo format.
        limit: A file with the bytes that this container may use, or "max".
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    free = _memory_bytes()
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    allowed = limit.read_text(encoding="utf-8").strip() if limit.is_file() else ""
    return min(free, int(allowed)) if allowed.isdecimal() else free


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpus() -> str:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) or "none"

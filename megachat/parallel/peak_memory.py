"""Measures the most memory that this process had at once: `PeakMemory`."""

import resource
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

from megachat.parallel.device_memory import driver_use

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"
"""What starts the peak anew when it is written to `clear_refs`; see proc(5)."""


class MemoryMeasure(StrEnum):
    """What a number of bytes counts."""

    STAGE = "resident set of the process, since the stage began"
    PROCESS = "resident set of the process, since it began"
    DEVICE = "memory of the device taken from its driver, since the stage began"
    """Pools of tensors and graphs, and what is mapped for weights and keys and values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPeak:
    """The most memory of one process."""

    num_bytes: int
    measure: MemoryMeasure


class PeakMemory:
    """The peak from now on, of a GPU's memory or of the process's own."""

    def __init__(self, device: torch.device, *, process: Path = _PROCESS) -> None:
        """Starts anew, where the system lets a process do that.

        Args:
            device: Where the tensors are.
            process: This process's folder in Linux's /proc.
        """
        self._device = device
        self._process = process
        self._measure = MemoryMeasure.PROCESS
        if device.type == "cuda":
            driver_use(device).begin()
            self._measure = MemoryMeasure.DEVICE
            return
        try:
            (process / "clear_refs").write_text(_RESET_PEAK, encoding="ascii")
        except OSError:  # not Linux, or a container that forbids it
            return
        self._measure = MemoryMeasure.STAGE

    def read(self) -> MemoryPeak:
        """The peak until now."""
        if self._measure is MemoryMeasure.DEVICE:
            return MemoryPeak(num_bytes=driver_use(self._device).peak(), measure=self._measure)
        return MemoryPeak(num_bytes=self._most_resident(), measure=self._measure)

    def _most_resident(self) -> int:
        status = self._process / "status"
        if status.is_file():
            for line in status.read_text(encoding="utf-8").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

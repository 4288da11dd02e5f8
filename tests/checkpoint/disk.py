"""A disk that counts, is slow or breaks: put beneath the reader of this process."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from megachat.checkpoint import reader


@dataclass
class Read:
    """One call of the disk."""

    file: str
    offset: int
    num_bytes: int


@dataclass
class Disk:
    """What this process has read, and what its disk does meanwhile."""

    reads: list[Read] = field(default_factory=list)
    before: Callable[[int], object] = lambda number: None
    """Called with the number of each read, from 0."""

    @property
    def num_bytes(self) -> int:
        return sum(read.num_bytes for read in self.reads)

    def read_into(self, original: Callable[..., int], file: BinaryIO, target: memoryview) -> int:
        self.before(len(self.reads))
        self.reads.append(Read(Path(file.name).name, file.tell(), len(target)))
        return original(file, target)


@contextmanager
def watched_disk(before: Callable[[int], object] = lambda number: None) -> Iterator[Disk]:
    """Reads of weights pass through the disk that the body gets."""
    disk, original = Disk(before=before), reader.read_into

    def read_into(file: BinaryIO, target: memoryview) -> int:
        return disk.read_into(original, file, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "read_into", read_into)
        yield disk


def slow(seconds: float, *, at: int) -> Callable[[int], None]:
    """A disk that needs `seconds` for one of its reads."""
    return lambda number: time.sleep(seconds) if number == at else None


def broken(*, at: int) -> Callable[[int], Any]:
    """A disk that fails at one of its reads."""

    def fail(number: int) -> None:
        if number == at:
            raise OSError(5, "Input/output error")

    return fail


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Puts into the list how many bytes this process grew by at most, in the body."""
    grown: list[int] = []
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is used now
    before = _memory("VmRSS")
    yield grown
    grown.append(_memory("VmHWM") - before)


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name} in /proc/self/status")

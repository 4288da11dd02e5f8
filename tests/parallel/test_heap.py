"""Freed memory is used again, counted by the pages that the system had to find."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megachat.parallel import heap
from megachat.parallel.launch import LaunchConfig

_COUNT = """
import resource, sys, torch
from megachat.parallel.heap import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for turn in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(100_000_000, dtype=torch.uint8).fill_(1)
        torch.empty(60_000_000, dtype=torch.uint8).fill_(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(mode: str) -> list[int]:
    """Pages that a process asked for in each of four rounds, which fill and free 640 MB."""
    command = [sys.executable, "-c", _COUNT, mode]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in ran.stdout.split()]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_what_was_freed_is_used_again() -> None:
    """The heap has found its shape in the last round."""
    kept, given_back = _faults("keep"), _faults("give back")
    assert kept[-1] < given_back[-1] / 10


def test_a_c_library_that_cannot_be_told_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: SimpleNamespace())
    assert not heap.keep_freed_memory()


def test_it_is_the_default_of_a_job() -> None:
    assert LaunchConfig().keep_freed_memory


_RETURN = """
import torch
from megachat.parallel.heap import keep_freed_memory, return_freed_memory
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
torch.empty(1)
assert keep_freed_memory()
before = resident()
large, small = torch.ones(25_000_000), [torch.ones(20_000) for _ in range(500)]
kept = small[::2]  # freed memory between memory that is in use
del large, small
print(resident() - before)
return_freed_memory()
print(resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_that_was_kept_goes_back_when_that_is_asked() -> None:
    command = [sys.executable, "-c", _RETURN]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, returned = (int(line) for line in ran.stdout.split())
    used = 250 * 80_000
    assert kept > 110e6
    assert used * 0.9 < returned < used * 1.3

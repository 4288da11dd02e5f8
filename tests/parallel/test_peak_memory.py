"""The peak of a process, and who counts it."""

from pathlib import Path

import pytest
import torch

from megachat.parallel.peak_memory import MemoryMeasure, PeakMemory
from tests.harness import run_ranks

CPU = torch.device("cpu")
SIZE = 200 << 20


def _two_stages() -> list[tuple[int, MemoryMeasure]]:
    """Peaks of a stage that takes memory for a while, and of one that takes none."""
    found = []
    for size in (SIZE, 1):
        memory = PeakMemory(CPU)
        torch.ones(size // 4 + 1)
        peak = memory.read()
        found.append((peak.num_bytes, peak.measure))
    return found


def test_memory_that_has_been_freed_counts_in_its_own_stage_and_not_in_the_next() -> None:
    (large, measure), (small, _) = run_ranks(1, _two_stages)[0]
    assert large - small > 0.9 * SIZE
    assert measure is MemoryMeasure.STAGE


def test_where_the_peak_cannot_start_anew_that_of_the_process_is_told_as_such(
    tmp_path: Path,
) -> None:
    (tmp_path / "clear_refs").mkdir()  # not to be written
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t 1 kB\n")
    peak = PeakMemory(CPU, process=tmp_path).read()
    assert (peak.num_bytes, peak.measure) == (2048 * 1024, MemoryMeasure.PROCESS)


def test_a_system_without_proc_tells_the_peak_of_the_process(tmp_path: Path) -> None:
    peak = PeakMemory(CPU, process=tmp_path / "none").read()
    assert peak.measure is MemoryMeasure.PROCESS
    assert peak.num_bytes > 50e6


def test_a_gpu_counts_what_was_taken_from_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([7, 5])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    peak = PeakMemory(torch.device("cuda", 3)).read()
    assert (peak.num_bytes, peak.measure) == (5, MemoryMeasure.DEVICE)

"""Resident memory of real reshards: what comes, goes again."""

import ctypes
import mmap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megachat.model.config import OptConfig
from megachat.parallel.collectives import barrier
from megachat.reshard.execute import Resharder
from megachat.reshard.ledger import ArenaLedger, arena_ledger
from tests.harness import run_ranks
from tests.harness.groups import groups_of
from tests.reshard.cases import Case, build_actor

WIDE = OptConfig(
    vocab_size=1000, max_positions=32, hidden=384, ffn=1536, layers=8, heads=8, embed_dim=384
)
"""57 MB of fp32, so that a process's own noise is well below 5 % of what is gathered."""
CASES: dict[int, list[Case]] = {
    2: [Case(train=(2, 1, 1), generate=1)],
    4: [
        Case(train=(2, 2, 1), generate=1),
        Case(train=(2, 2, 1), generate=2),
        Case(train=(2, 2, 1), generate=4),
        Case(train=(1, 2, 2), generate=2),
        Case(train=(1, 2, 2), generate=4),
    ],
    8: [
        Case(train=(4, 2, 1), generate=2),
        Case(train=(2, 2, 2), generate=1),
    ],
}
"""Every kind of move: along the tensor axis, the pipeline axis and both, with and without replicas;
what the other pairs of the design take is the ledger's, which the plan's tests compare."""
ROUNDS = 3
"""Reshards of which the quietest counts: other threads of the process add memory, never take it."""


def _resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def _resident_now() -> int:
    """Resident bytes without those that the C library keeps of freed memory."""
    ctypes.CDLL(None).malloc_trim(0)
    return _resident("VmRSS")


@dataclass(frozen=True)
class Growth:
    """Of the resident bytes of one rank over a reshard."""

    ledger: ArenaLedger
    peak: int
    gathered: int
    left: int
    """After the release."""


def _growth(world_size: int) -> list[Growth]:
    rows = []
    for case in CASES[world_size]:
        groups = groups_of(case.source)
        actor = build_actor(case, WIDE, torch.float32, groups=groups)
        resharder = Resharder(actor.arena, actor.groups)
        rounds = []
        for _ in range(ROUNDS):
            actor.arena.release()
            barrier()
            start = _resident_now()
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            resharder.gather()
            peak = _resident("VmHWM") - start
            gathered = _resident_now() - start
            actor.arena.release()
            rounds.append((peak, gathered, _resident_now() - start))
        peak, gathered, left = min(rounds)
        ledger = arena_ledger(actor.arena.part, element_bytes=4, page_bytes=mmap.PAGESIZE)
        rows.append(Growth(ledger=ledger, peak=peak, gathered=gathered, left=left))
    return rows


@pytest.mark.parametrize("world_size", CASES)
def test_a_reshard_takes_the_planned_memory_and_gives_it_back(world_size: int) -> None:
    for rank, rows in enumerate(run_ranks(world_size, _growth, world_size)):
        for row in rows:
            foreign = row.ledger.foreign_shard
            assert foreign > 7e6
            assert abs(row.gathered - foreign) <= 0.05 * foreign, (rank, row)
            assert row.peak <= 1.05 * row.ledger.growth, (rank, row)
            assert abs(row.left) <= 0.05 * foreign, (rank, row)

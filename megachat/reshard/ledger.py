"""The one place for the memory that a weight arena takes in each phase, predicted from the plan.

Pure, and exact to the page where memory can be given back (`parallel.memory`). What training and
generation hold beside the weights is the planner's business.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from megachat.reshard.records import RankPlan


class ArenaPhase(StrEnum):
    """What the arena is used for."""

    TRAINING = "training"
    RESHARD = "reshard"
    GENERATION = "generation"


class ArenaPool(StrEnum):
    """Kinds of memory behind or beside an arena."""

    TRAINING_SHARD = "training_shard"
    """Pages that hold what this rank trains: they never move."""
    FOREIGN_SHARD = "foreign_shard"
    """Pages that hold only other ranks' shards: they come and go."""
    STAGING = "staging"
    """Packed pieces on their way out, outside the arena."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArenaLedger:
    """Resident bytes of one rank."""

    training_shard: int
    foreign_shard: int
    staging: int

    def resident(self, phase: ArenaPhase, pool: ArenaPool) -> int:
        """Bytes of a pool at the peak of a phase."""
        if pool is ArenaPool.TRAINING_SHARD:
            return self.training_shard
        if pool is ArenaPool.FOREIGN_SHARD:
            return 0 if phase is ArenaPhase.TRAINING else self.foreign_shard
        return self.staging if phase is ArenaPhase.RESHARD else 0

    def peak(self, phase: ArenaPhase) -> int:
        """Bytes of all pools at the peak of a phase."""
        return sum(self.resident(phase, pool) for pool in ArenaPool)

    @property
    def growth(self) -> int:
        """Most that a reshard adds to the memory of training."""
        return self.peak(ArenaPhase.RESHARD) - self.peak(ArenaPhase.TRAINING)


def arena_ledger(part: RankPlan, *, element_bytes: int, page_bytes: int) -> ArenaLedger:
    """The ledger of one rank.

    Args:
        part: Its plan.
        element_bytes: Bytes of one parameter.
        page_bytes: Unit in which memory is given back; an arena that cannot give any back keeps
            its foreign shard in all phases.
    """
    pages = -(-part.elements * element_bytes // page_bytes)
    kept = sum(len(run) for run in _kept_pages(part, element_bytes, page_bytes))
    return ArenaLedger(
        training_shard=kept * page_bytes,
        foreign_shard=(pages - kept) * page_bytes,
        staging=part.traffic.staged,
    )


def _kept_pages(part: RankPlan, element_bytes: int, page_bytes: int) -> Iterator[range]:
    """Runs of pages that a flat buffer touches, each page once."""
    end = 0
    for flat in part.flats:
        if flat.names:
            first = flat.offset * element_bytes // page_bytes
            stop = -(-(flat.offset + flat.padded_elements) * element_bytes // page_bytes)
            yield range(max(first, end), stop)
            end = max(stop, end)

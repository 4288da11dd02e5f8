"""The one place that runs a reshard plan: transfers in the order of the layers, in place.

Blocks are in flight together, about one bucket of bytes of them, so that the next ones are on their
way while one lands. Nothing is sent on the way back: `WeightArena.release` gives the foreign part
of the memory back.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megachat.errors import LayoutError
from megachat.parallel.collectives import PendingTransfer, start_exchange, start_gather
from megachat.parallel.groups import GenerationGroups
from megachat.reshard.arena import WeightArena
from megachat.reshard.records import Exchange, Gather, Scope, Step, View
from megachat.telemetry.timers import nothing_to_wait_for


@dataclass(frozen=True, kw_only=True, slots=True)
class ReshardReport:
    """What one reshard did on this rank."""

    received_bytes: int
    """Counted at the collectives; 0 if nothing had changed since the last one."""
    redundant_bytes: int
    """Of the training shard, kept beside the generation shard."""
    staged_bytes: int
    """Most that was packed outside the arena at once."""
    seconds: float
    """Until this rank's device had everything."""

    @classmethod
    def of_all_ranks(cls, reports: Sequence["ReshardReport"]) -> "ReshardReport":
        """The slowest and largest of what each rank did."""
        return cls(
            received_bytes=max(report.received_bytes for report in reports),
            redundant_bytes=max(report.redundant_bytes for report in reports),
            staged_bytes=max(report.staged_bytes for report in reports),
            seconds=max(report.seconds for report in reports),
        )


class Resharder:
    """Fills the generation shard of one arena, as often as the weights change."""

    def __init__(
        self,
        arena: WeightArena,
        groups: GenerationGroups,
        *,
        synchronize: Callable[[], None] = nothing_to_wait_for,
    ) -> None:
        """Prepares the views that the transfers work on.

        Args:
            arena: Whose shard is filled.
            groups: Of its placement.
            synchronize: Waits until the device has done what it was told, so that a report counts
                the time of the transfers and not of their launch.

        Raises:
            LayoutError: Arena and groups belong to different placements or ranks.
        """
        if groups.placement != arena.plan.placement or groups.rank != arena.part.rank:
            raise LayoutError(
                f"the arena is of rank {arena.part.rank} in {arena.plan.placement}, the groups are "
                f"of rank {groups.rank} in {groups.placement}: build both from one plan"
            )
        self._arena = arena
        self._synchronize = synchronize
        self._scopes: dict[Scope, dist.ProcessGroup] = {
            Scope.GATHER: groups.gather,
            Scope.PIPELINE: groups.pipeline,
            Scope.TILES: groups.tiles,
        }
        self._tensors: dict[View, Tensor] = {}
        self._received = self._staged = 0

    def gather(self) -> ReshardReport:
        """Fetches what the generation shard lacks; a collective call of all ranks.

        Moves nothing if the weights have not changed since the last call and were not released.
        """
        self._synchronize()  # what was asked of the device before is no part of this
        start = time.perf_counter()
        self._received = self._staged = 0
        for _ in self.stream():
            pass
        self._synchronize()
        return ReshardReport(
            received_bytes=self._received,
            redundant_bytes=self._arena.part.traffic.redundant,
            staged_bytes=self._staged,
            seconds=time.perf_counter() - start,
        )

    def stream(self) -> Iterator[Step]:
        """Like `gather`, but yields each step as soon as its weights have landed.

        Everything outside the layers lands first, then the layers in order: a prefill may use layer
        i of a stage after the last step with `step.layer == i`. The whole shard is valid when the
        iteration ends, and must be iterated to its end.
        """
        if self._arena.is_current:
            return
        self._arena.acquire()
        in_flight: deque[_InFlight] = deque()
        for step in self._arena.part.steps:
            while in_flight and not self._fits(in_flight, step):
                yield in_flight.popleft().land()
            in_flight.append(self._start(step))
            self._received += in_flight[-1].received_bytes
            self._staged = max(self._staged, sum(item.staged_bytes for item in in_flight))
        while in_flight:
            yield in_flight.popleft().land()
        self._arena.mark_gathered()

    def _fits(self, in_flight: Collection["_InFlight"], step: Step) -> bool:
        """Whether a step may start: at most a bucket is staged, and about a bucket on its way."""
        limit = self._arena.plan.bucket_bytes
        staged = sum(item.staged_bytes for item in in_flight) + self._staged_bytes(step)
        return staged <= limit and sum(item.received_bytes for item in in_flight) <= limit

    def _staged_bytes(self, step: Step) -> int:
        """What the transfers of a step pack: one at a time, so the largest counts."""
        return step.staged_elements * self._arena.plan.element_bytes

    def _start(self, step: Step) -> "_InFlight":
        """Starts the transfers of a step; each waits for the one before, which it may forward.

        Gathers of one scope touch different slots and do not depend on each other.
        """
        pending: list[PendingTransfer] = []
        received = 0
        scope: Scope | None = None
        for transfer in step.transfers:
            kind = transfer.scope if isinstance(transfer, Gather) else None
            if kind is None or kind is not scope:
                _wait(pending)
                pending = []
            scope = kind
            pending.append(self._begin(transfer))
            received += pending[-1].received_bytes
        return _InFlight(
            step=step,
            pending=pending,
            received_bytes=received,
            staged_bytes=self._staged_bytes(step),
        )

    def _begin(self, transfer: Gather | Exchange) -> PendingTransfer:
        if isinstance(transfer, Gather):
            slots = [self._tensor(view) for view in transfer.slots]
            return start_gather(slots, self._scopes[transfer.scope])
        outgoing = {piece.view: self._tensor(piece.view) for piece in transfer.sends}
        outgoing |= {view: outgoing[view].contiguous() for view in transfer.packed_views}
        return start_exchange(
            sends=[(piece.stage, outgoing[piece.view]) for piece in transfer.sends],
            receives=[(piece.stage, self._tensor(piece.view)) for piece in transfer.receives],
            group=self._scopes[Scope.PIPELINE],
        )

    def _tensor(self, view: View) -> Tensor:
        """The tensor of a view, made once: a phase change has thousands."""
        if view not in self._tensors:
            self._tensors[view] = self._arena.view(view)
        return self._tensors[view]


@dataclass(frozen=True, kw_only=True, slots=True)
class _InFlight:
    """A step whose last transfers have been started."""

    step: Step
    pending: list[PendingTransfer]
    received_bytes: int
    staged_bytes: int

    def land(self) -> Step:
        """Waits until its weights are here."""
        _wait(self.pending)
        return self.step


def _wait(pending: list[PendingTransfer]) -> None:
    for transfer in pending:
        transfer.wait()

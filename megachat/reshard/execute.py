"""The one place that runs a reshard plan: transfers in the order of the layers, in place.

Small blocks are in flight together, up to one bucket of bytes or two blocks, so that the next ones
are on their way while one lands. Nothing is sent on the way back: `WeightArena.release` gives the
foreign part of the memory back.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megachat.errors import LayoutError
from megachat.parallel.collectives import PendingTransfer, start_exchange, start_gather
from megachat.parallel.groups import GenerationGroups
from megachat.reshard.arena import WeightArena
from megachat.reshard.records import Exchange, Gather, Scope, Step, View


@dataclass(frozen=True, kw_only=True, slots=True)
class ReshardReport:
    """What one reshard did on this rank."""

    received_bytes: int
    """Counted at the collectives; 0 if nothing had changed since the last one."""
    staged_bytes: int
    """Most that was packed outside the arena at once."""
    seconds: float


class Resharder:
    """Fills the generation shard of one arena, as often as the weights change."""

    def __init__(self, arena: WeightArena, groups: GenerationGroups) -> None:
        """Prepares the views that the transfers work on.

        Raises:
            LayoutError: Arena and groups belong to different placements or ranks.
        """
        if groups.placement != arena.plan.placement or groups.rank != arena.part.rank:
            raise LayoutError(
                f"the arena is of rank {arena.part.rank} in {arena.plan.placement}, the groups are "
                f"of rank {groups.rank} in {groups.placement}: build both from one plan"
            )
        self._arena = arena
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
        start = time.perf_counter()
        self._received = self._staged = 0
        for _ in self.stream():
            pass
        return ReshardReport(
            received_bytes=self._received,
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
        in_flight: deque[tuple[Step, list[PendingTransfer]]] = deque()
        on_the_way = 0
        for step in self._arena.part.steps:
            pending = self._start(step)
            in_flight.append((step, pending))
            on_the_way += _bytes(pending)
            while len(in_flight) > 1 and on_the_way > self._arena.plan.bucket_bytes:
                landed, pending = in_flight.popleft()
                _wait(pending)
                on_the_way -= _bytes(pending)
                yield landed
        for landed, pending in in_flight:
            _wait(pending)
            yield landed
        self._arena.mark_gathered()

    def _start(self, step: Step) -> list[PendingTransfer]:
        """Starts the transfers of a step; each waits for the one before, which it may forward.

        Transfers of the same scope that touch different slots do not depend on each other.
        """
        pending: list[PendingTransfer] = []
        scope: Scope | None = None
        for transfer in step.transfers:
            kind = transfer.scope if isinstance(transfer, Gather) else None
            if kind is None or kind is not scope:
                _wait(pending)
                pending = []
            scope = kind
            started = self._begin(transfer)
            self._received += started.received_bytes
            pending.append(started)
        return pending

    def _begin(self, transfer: Gather | Exchange) -> PendingTransfer:
        if isinstance(transfer, Gather):
            slots = [self._tensor(view) for view in transfer.slots]
            return start_gather(slots, self._scopes[transfer.scope])
        packed = {view: self._tensor(view).contiguous() for view in transfer.packed_views}
        self._staged = max(self._staged, sum(tensor.nbytes for tensor in packed.values()))
        started = start_exchange(
            sends=[
                (
                    piece.stage,
                    packed[piece.view] if piece.view in packed else self._tensor(piece.view),
                )
                for piece in transfer.sends
            ],
            receives=[(piece.stage, self._tensor(piece.view)) for piece in transfer.receives],
            group=self._scopes[Scope.PIPELINE],
        )
        if packed:  # so that no second bucket is packed meanwhile
            started.wait()
            return PendingTransfer(works=(), received_bytes=started.received_bytes)
        return started

    def _tensor(self, view: View) -> Tensor:
        """The tensor of a view, made once: a phase change has thousands."""
        if view not in self._tensors:
            self._tensors[view] = self._arena.view(view)
        return self._tensors[view]


def _bytes(pending: list[PendingTransfer]) -> int:
    return sum(transfer.received_bytes for transfer in pending)


def _wait(pending: list[PendingTransfer]) -> None:
    for transfer in pending:
        transfer.wait()

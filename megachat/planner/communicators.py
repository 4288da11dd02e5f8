"""Counts a rank's NCCL communicators and predicts the GPU memory of their buffers. Pure.

NCCL takes buffers for each connection of each channel, when a communicator is first used for what
needs the connection (NCCL 2.22 and later; before, all at once). The counts, with their sources:

* A receiving end holds the buffers of three protocols: 4 MiB (`NCCL_BUFFSIZE`), 4.69 MiB (LL128)
  and 0.5 MiB (LL), in driver memory of 2 MiB granules: 10 MiB; a sending end inside a node 2 MiB.
  Both sizes are in a log in NVIDIA/nccl issue 1685. Between nodes the sending end has the buffers
  too, for the network card to read (GPUDirect).
* A group inside a node has 24 channels on A100 and H100 with NVSwitch; one of 8 GPUs on several
  nodes 16, two for each network card (`24 coll channels`, `16 coll channels` in logs of
  `NCCL_DEBUG=INFO`, as in NVIDIA/nccl issues 1453 and 1703). Each GPU is taken to have a card.
* A ring has a connection each way. A tree has one up and one down in a node, and up to one up and
  two down between nodes. Sums are taken to use both (on H100 NVLS instead of trees).
* Sending and receiving has connections of its own: 32 channels a peer inside a node, 2 where the
  communicator spans nodes. For an all-to-all of 8 H100, issue 1685 reports 3.28 GB; 32 channels
  to 8 peers (itself included) are 3.22 GB.

None of this was measured with this project's jobs. `NCCL_MAX_NCHANNELS`, `NCCL_MAX_P2P_NCHANNELS`
and `NCCL_BUFFSIZE` make it less.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache

from megachat.parallel.layout import Axis, Coordinate, GenerationPlacement, ParallelLayout

_MIB = 2**20
_RECEIVING, _SENDING = 10 * _MIB, 2 * _MIB
_NEAR = _RECEIVING + _SENDING
"""A connection each way inside a node."""
_FAR = 2 * _RECEIVING
"""A connection each way between nodes."""
_NODE_CHANNELS, _CARD_CHANNELS, _MOST_FAR_CHANNELS = 24, 2, 16
_PEER_CHANNELS, _FAR_PEER_CHANNELS = 32, 2


class Use(StrEnum):
    """What a communicator is used for."""

    SUM = "sum"
    """All-reduce, of any size: rings and trees."""
    GATHER = "gather"
    """All-gather, reduce-scatter, broadcast: rings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Communicator:
    """One group of ranks that communicates, as one of them sees it."""

    name: str
    ranks: Sequence[int]
    """A range where they follow each other at equal distances: there may be thousands."""
    use: Use
    peers: tuple[int, ...] = ()
    """Ranks that this one exchanges tensors with, one to one."""

    def buffer_bytes(self, rank: int, *, ranks_per_node: int) -> int:
        """Predicted bytes of NCCL's buffers on a rank of the group."""
        node = rank // ranks_per_node
        local = _count_between(self.ranks, node * ranks_per_node, (node + 1) * ranks_per_node)
        trees = self.use is Use.SUM
        if local == len(self.ranks):
            links = 1 + (min(2, local - 1) if trees else 0)
            exchange = len(self.peers) * _PEER_CHANNELS * _NEAR
            return _NODE_CHANNELS * links * _NEAR + exchange
        # A GPU is where its own card's channels leave the node, and inside the node on the others.
        channels = min(_MOST_FAR_CHANNELS, _CARD_CHANNELS * local)
        near = 1 + (min(2, local - 1) if trees else 0)
        inside = (channels - _CARD_CHANNELS) * near * _NEAR
        outside = _CARD_CHANNELS * (4 if trees else 1) * _FAR
        exchange = sum(
            _FAR_PEER_CHANNELS * (_NEAR if peer // ranks_per_node == node else _FAR)
            for peer in self.peers
        )
        return inside + outside + exchange


@cache
def communicators(
    actor: ParallelLayout, critic: ParallelLayout, generation_tensor: int, *, rank: int
) -> tuple[Communicator, ...]:
    """The communicators of a PPO job on one rank; a group of one rank needs none.

    Groups of the same ranks in the same order share one (`megachat.parallel.groups`), of whatever
    role and layout; reference and reward model have those of actor and critic.
    """
    placement = GenerationPlacement(source=actor, tensor=generation_tensor)
    found = [
        Communicator(name="world", ranks=range(actor.world_size), use=Use.SUM),
        *_of_layout(actor, rank, crosses_stages=_crosses_stages(placement)),
        *(_of_layout(critic, rank, crosses_stages=False) if critic != actor else ()),
        *_of_generation(placement, rank),
    ]
    by_ranks: dict[Sequence[int], list[Communicator]] = defaultdict(list)
    for item in found:
        by_ranks[_evenly(item.ranks)].append(item)
    return tuple(_shared(ranks, items) for ranks, items in by_ranks.items() if len(ranks) > 1)


def _evenly(ranks: Sequence[int]) -> range | tuple[int, ...]:
    """Ranks as a range, if they are one, so that equal groups are equal and cheap to compare."""
    if isinstance(ranks, range):
        return ranks
    ranks = tuple(ranks)
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    evenly = range(ranks[0], ranks[0] + step * len(ranks), step)
    return evenly if tuple(evenly) == ranks else ranks


def _shared(ranks: Sequence[int], items: Sequence[Communicator]) -> Communicator:
    """One communicator for all that groups of the same ranks do."""
    return Communicator(
        name=", ".join(item.name for item in items),
        ranks=ranks,
        use=Use.SUM if any(item.use is Use.SUM for item in items) else Use.GATHER,
        peers=tuple(sorted({peer for item in items for peer in item.peers})),
    )


@cache
def communicator_bytes(
    actor: ParallelLayout, critic: ParallelLayout, generation_tensor: int, *, ranks_per_node: int
) -> int:
    """Predicted bytes of NCCL's buffers on the rank that has most, looked for on each stage."""
    stages = {
        stage * layout.tensor * layout.data
        for layout in (actor, critic)
        for stage in (0, layout.pipeline // 2, layout.pipeline - 1)
    }
    return max(
        sum(
            item.buffer_bytes(rank, ranks_per_node=ranks_per_node)
            for item in communicators(actor, critic, generation_tensor, rank=rank)
        )
        for rank in stages
    )


def _of_layout(
    layout: ParallelLayout, rank: int, *, crosses_stages: bool
) -> Iterator[Communicator]:
    """The groups of `megachat.parallel.groups.ProcessGroups`."""
    stages = layout.ranks_along(Axis.PIPELINE, rank)
    here = layout.coordinate(rank)
    for name, ranks in (
        ("tensor", layout.ranks_along(Axis.TENSOR, rank)),
        ("data", _data_group(layout, rank)),
        ("model", _model_group(layout, here.data)),
    ):
        yield Communicator(name=f"{layout} {name}", ranks=ranks, use=Use.SUM)
    yield Communicator(
        name=f"{layout} pipeline",
        ranks=stages,
        use=Use.GATHER,
        peers=_others(stages, rank) if crosses_stages else _neighbours(stages, here.pipeline),
    )
    if here.pipeline in (0, layout.pipeline - 1):
        ends = tuple(dict.fromkeys((stages[0], stages[-1])))
        yield Communicator(name=f"{layout} embedding", ranks=ends, use=Use.SUM)


def _of_generation(placement: GenerationPlacement, rank: int) -> Iterator[Communicator]:
    """The groups of `megachat.parallel.groups.GenerationGroups`."""
    for name, ranks, use in (
        ("tensor", placement.tensor_group(rank), Use.SUM),
        ("data", _replicas(placement, rank), Use.GATHER),
        ("tiles", placement.tile_group(rank), Use.GATHER),
        ("gather", placement.gather_group(rank), Use.GATHER),
    ):
        yield Communicator(name=f"generation {name}", ranks=ranks, use=use)


def _replicas(placement: GenerationPlacement, rank: int) -> Sequence[int]:
    """`placement.replica_group`, as a range where a rank in each period is in it."""
    if placement.tiles == 1:
        return range(rank % placement.period, placement.source.world_size, placement.period)
    return placement.replica_group(rank)


def _crosses_stages(placement: GenerationPlacement) -> bool:
    """Whether a reshard may send tensors from each stage to each other one, point to point.

    It does where generation cuts finer than training, and where stages meet before tiles do (which
    `megachat.reshard.plan` decides by bytes between nodes; planned wherever it could).
    """
    return placement.source.pipeline > 1 and (placement.splits > 1 or placement.tiles > 1)


def _data_group(layout: ParallelLayout, rank: int) -> range:
    """`layout.ranks_along(Axis.DATA, rank)`."""
    first = layout.rank_of(replace(layout.coordinate(rank), data=0))
    return range(first, first + layout.tensor * layout.data, layout.tensor)


@cache
def _model_group(layout: ParallelLayout, data: int) -> tuple[int, ...]:
    return tuple(
        layout.rank_of(Coordinate(tensor=tensor, data=data, pipeline=pipeline))
        for pipeline in range(layout.pipeline)
        for tensor in range(layout.tensor)
    )


def _count_between(ranks: Sequence[int], first: int, end: int) -> int:
    """How many of the ranks are at least `first` and below `end`.

    A group of more ranks than a node has GPUs is in ascending order, and may hold thousands.
    """
    if len(ranks) <= end - first:
        return sum(first <= rank < end for rank in ranks)
    return bisect_left(ranks, end) - bisect_left(ranks, first)


def _others(ranks: Sequence[int], rank: int) -> tuple[int, ...]:
    return tuple(member for member in ranks if member != rank)


def _neighbours(stages: Sequence[int], stage: int) -> tuple[int, ...]:
    """The stages before and after one."""
    around = (stage - 1, stage + 1)
    return tuple(stages[other] for other in around if 0 <= other < len(stages))

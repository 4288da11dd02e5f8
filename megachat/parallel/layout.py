"""The one place for rank arithmetic: which rank sits where in a tensor x data x pipeline grid.

Pure: no process group, no device. Two or more layouts are alive in every RLHF job.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from itertools import chain

from megachat.errors import LayoutError


class Axis(StrEnum):
    """A mesh axis of a layout."""

    TENSOR = "tensor"
    """Ranks that share every layer by slices of its matrices."""
    DATA = "data"
    """Ranks that hold the same parameters and see different rows."""
    PIPELINE = "pipeline"
    """Ranks that hold consecutive ranges of layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Coordinate:
    """Position of one rank in a layout."""

    tensor: int
    data: int
    pipeline: int

    def along(self, axis: Axis) -> int:
        """The position on one axis."""
        return {
            Axis.TENSOR: self.tensor,
            Axis.DATA: self.data,
            Axis.PIPELINE: self.pipeline,
        }[axis]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelLayout:
    """Degrees of tensor, pipeline and data parallelism of one model role.

    Ranks are numbered tensor fastest, then data, then pipeline, as Megatron does: tensor-parallel
    ranks are neighbours (one node), pipeline stages are farthest apart.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    def __post_init__(self) -> None:
        """Refuses degrees below one."""
        if min(self.tensor, self.pipeline, self.data) < 1:
            raise LayoutError(f"layout {self}: every degree must be at least 1")

    def __str__(self) -> str:
        """`tp2.pp2.dp1`."""
        return f"tp{self.tensor}.pp{self.pipeline}.dp{self.data}"

    @classmethod
    def for_world(cls, world_size: int, *, tensor: int = 1, pipeline: int = 1) -> "ParallelLayout":
        """The layout that fills `world_size` ranks, the data degree derived.

        Raises:
            LayoutError: tensor x pipeline does not divide the world size.
        """
        model_ranks = tensor * pipeline
        if model_ranks < 1 or world_size % model_ranks:
            raise LayoutError(
                f"world size {world_size} is not a multiple of tensor {tensor} x pipeline "
                f"{pipeline} = {model_ranks}: change the number of processes or the degrees"
            )
        return cls(tensor=tensor, pipeline=pipeline, data=world_size // model_ranks)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data

    def degree(self, axis: Axis) -> int:
        """Number of ranks along one axis."""
        return {
            Axis.TENSOR: self.tensor,
            Axis.DATA: self.data,
            Axis.PIPELINE: self.pipeline,
        }[axis]

    def coordinate(self, rank: int) -> Coordinate:
        """Position of a rank.

        Raises:
            LayoutError: The rank is outside the layout.
        """
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is outside layout {self} of {self.world_size} ranks")
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinate(tensor=tensor, data=data, pipeline=pipeline)

    def rank_of(self, coordinate: Coordinate) -> int:
        """Inverse of `coordinate`."""
        inner = coordinate.data + self.data * coordinate.pipeline
        return coordinate.tensor + self.tensor * inner

    def ranks_along(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """Ranks that differ from `rank` on `axis` only, in axis order, `rank` included."""
        here = self.coordinate(rank)
        stride = {
            Axis.TENSOR: 1,
            Axis.DATA: self.tensor,
            Axis.PIPELINE: self.tensor * self.data,
        }[axis]
        first = rank - here.along(axis) * stride
        return tuple(range(first, first + self.degree(axis) * stride, stride))

    def groups_along(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """All groups of ranks along one axis, each rank in exactly one, ordered by first rank."""
        return tuple(
            self.ranks_along(axis, rank)
            for rank in range(self.world_size)
            if self.coordinate(rank).along(axis) == 0
        )

    def model_groups(self) -> tuple[tuple[int, ...], ...]:
        """All groups of ranks that together hold one copy of the model (tensor x pipeline)."""
        return tuple(
            tuple(rank for rank in range(self.world_size) if self.coordinate(rank).data == data)
            for data in range(self.data)
        )

    def embedding_groups(self) -> tuple[tuple[int, ...], ...]:
        """Groups of the first and the last pipeline stage, which share the tied embedding."""
        return tuple(
            tuple(dict.fromkeys((ranks[0], ranks[-1])))
            for ranks in self.groups_along(Axis.PIPELINE)
        )

    def is_first_stage(self, rank: int) -> bool:
        """Whether the rank holds the input embedding."""
        return self.coordinate(rank).pipeline == 0

    def is_last_stage(self, rank: int) -> bool:
        """Whether the rank holds the output head."""
        return self.coordinate(rank).pipeline == self.pipeline - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationPlacement:
    """Who generates what: a tensor-only layout laid over the ranks of a training layout.

    Each rank's generation shard contains its training shard (generation degree at most the
    training degree), or lies inside the same rows (generation degree above it), so a reshard never
    discards what a rank holds. With `tiles = training / generation` tensor degrees, training tensor
    rank a is tile `a % tiles` of generation tensor rank `a // tiles`; with `splits` the inverse
    ratio, it is one of generation ranks `a * splits .. a * splits + splits - 1`.
    """

    source: ParallelLayout
    """The training layout."""
    tensor: int
    """Tensor degree of generation; every rank generates, so there are world / tensor replicas."""

    def __post_init__(self) -> None:
        """Refuses degrees that do not nest into the training layout."""
        if not self._is_legal(self.source, self.tensor):
            raise LayoutError(
                f"generation tensor degree {self.tensor} does not fit training layout "
                f"{self.source}: it must divide the world of {self.source.world_size} ranks and "
                f"divide or be a multiple of tensor degree {self.source.tensor}; nearest: "
                f"{nearest_degrees(self.tensor, self.legal_degrees(self.source))}"
            )

    @staticmethod
    def legal_degrees(source: ParallelLayout) -> tuple[int, ...]:
        """Generation tensor degrees that nest into a training layout, ascending."""
        nests = GenerationPlacement._is_legal
        return tuple(degree for degree in divisors(source.world_size) if nests(source, degree))

    @staticmethod
    def _is_legal(source: ParallelLayout, degree: int) -> bool:
        """Whether a generation tensor degree nests into a training layout."""
        if degree < 1 or source.world_size % degree:
            return False
        return source.tensor % degree == 0 or degree % source.tensor == 0

    @property
    def tiles(self) -> int:
        """Training shards side by side in one generation shard of the same layers."""
        return max(1, self.source.tensor // self.tensor)

    @property
    def splits(self) -> int:
        """Generation shards side by side in one training shard."""
        return max(1, self.tensor // self.source.tensor)

    @property
    def replicas(self) -> int:
        """Independent copies of the model that generate."""
        return self.source.world_size // self.tensor

    def tile(self, rank: int) -> int:
        """Which tile of its generation shard a rank trains."""
        return self.source.coordinate(rank).tensor % self.tiles

    def split(self, rank: int) -> int:
        """Which part of its training shard a rank generates with."""
        return rank // self.source.tensor % self.splits

    def tensor_rank(self, rank: int) -> int:
        """Position in the generation tensor group."""
        return self.source.coordinate(rank).tensor // self.tiles * self.splits + self.split(rank)

    def replica(self, rank: int) -> int:
        """Number of the copy of the model that a rank belongs to."""
        return rank // (self.source.tensor * self.splits) * self.tiles + self.tile(rank)

    def tensor_group(self, rank: int) -> tuple[int, ...]:
        """Ranks of one copy of the model, in the order of their generation tensor ranks."""
        width = self.source.tensor
        first = rank - rank % (width * self.splits) + self.tile(rank)
        return tuple(
            first + index // self.splits * self.tiles + index % self.splits * width
            for index in range(self.tensor)
        )

    @property
    def period(self) -> int:
        """Neighbouring ranks that hold whole copies of the model; the next ones do the same."""
        return self.source.tensor * self.splits

    def replica_group(self, rank: int) -> tuple[int, ...]:
        """Ranks with the same generation tensor rank in all the copies, by replica.

        Within a period these are neighbours, one for each tile, and ascend as their replicas do.
        """
        own = self.tensor_rank(rank)
        first = [each for each in range(self.period) if self.tensor_rank(each) == own]
        columns = (range(each, self.source.world_size, self.period) for each in first)
        return tuple(chain.from_iterable(zip(*columns, strict=True)))

    def tile_group(self, rank: int) -> tuple[int, ...]:
        """Ranks of one stage whose training shards make up the same generation shard."""
        first = rank - self.tile(rank)
        return tuple(range(first, first + self.tiles))

    def gather_group(self, rank: int) -> tuple[int, ...]:
        """Ranks of all stages whose training shards make up one generation shard, by stage, tile.

        Only for a generation degree that is at most the training degree.
        """
        stages = self.source.ranks_along(Axis.PIPELINE, rank)
        return tuple(member for stage in stages for member in self.tile_group(stage))


@cache
def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return tuple(dict.fromkeys((*small, *(number // divisor for divisor in reversed(small)))))


def nearest_degrees(wanted: int, legal: Iterable[int]) -> str:
    """The legal degrees just below and just above a wanted one, for a message."""
    below = max((degree for degree in legal if degree < wanted), default=None)
    above = min((degree for degree in legal if degree > wanted), default=None)
    found = [str(degree) for degree in (below, above) if degree is not None]
    return " or ".join(found) or "none"

"""The one place for the records that a reshard plan consists of. Pure values."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from megachat.model.specs import TensorSpec
from megachat.parallel.layout import GenerationPlacement, ParallelLayout
from megachat.reshard.blocks import Block


class HopOrder(StrEnum):
    """How the shards of several stages and tiles come together."""

    DIRECT = "direct"
    """One gather over all stages and tiles."""
    STAGES_FIRST = "stages_first"
    """Across stages on one tile each, then among the tiles: least between nodes."""


class NodeSpan(StrEnum):
    """Whether a generation tensor group may span nodes."""

    REFUSE = "refuse"
    ALLOW = "allow"


class Scope(StrEnum):
    """Ranks that take part in a gather."""

    GATHER = "gather"
    """All stages and tiles of one generation shard, by stage, then tile."""
    PIPELINE = "pipeline"
    """The stages of one training pipeline."""
    TILES = "tiles"
    """The tiles of one stage of a generation shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A strided view of the arena, in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether it covers one range of memory in order."""
        return self.strides == contiguous_strides(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gather:
    """Slot i of every rank of the scope becomes what rank i of the scope has there."""

    scope: Scope
    slots: tuple[View, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One tensor that goes to, or comes from, another stage of the same training pipeline."""

    stage: int
    view: View
    """Where it is in this rank's arena. Received pieces are contiguous."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """Point-to-point transfers within a training pipeline that may run at the same time."""

    sends: tuple[Piece, ...]
    receives: tuple[Piece, ...]

    @property
    def packed_views(self) -> tuple[View, ...]:
        """What is packed before it is sent, because it is not contiguous; each once."""
        views = dict.fromkeys(piece.view for piece in self.sends)
        return tuple(view for view in views if not view.is_contiguous)

    @property
    def staged_elements(self) -> int:
        """Elements packed outside the arena."""
        return sum(view.elements for view in self.packed_views)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The transfers of one block, to be run in order."""

    block: str
    layer: int | None
    """Position within each stage of the layer that is complete after the layer's last step."""
    transfers: tuple[Gather | Exchange, ...]

    @property
    def staged_elements(self) -> int:
        """Most elements that one of its transfers packs outside the arena."""
        exchanges = (item for item in self.transfers if isinstance(item, Exchange))
        return max((exchange.staged_elements for exchange in exchanges), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Flat:
    """Where the optimizer's flat buffer for one block lies."""

    names: tuple[str, ...]
    """Specifications in order; empty where this stage holds nothing of the block."""
    offset: int
    elements: int
    """Of the parameters."""
    padded_elements: int
    """Of the buffer. Its padding lies over bytes that belong to other ranks' shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One parameter of the generation shard."""

    spec: TensorSpec
    view: View
    """The generation shard of the parameter; with a leading dimension `tiles` where columns are
    cut: `[tiles, out, in / training degree]`, or `[1, out, in / generation degree]` of the part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes of one reshard for one rank; the way back moves none."""

    received: int
    received_inter_node: int
    sent: int
    """Counting each receiver; what a ring or a tree forwards is not counted."""
    lower_bound: int
    """Generation shard less what the rank trains of it."""
    redundant: int
    """Of the training shard, outside the generation shard."""
    staged: int
    """Most that is packed outside the arena at any time."""
    shard: int
    """Generation shard."""

    @property
    def received_intra_node(self) -> int:
        """Received from ranks of the same node."""
        return self.received - self.received_inter_node


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """One rank's arena and transfers, in elements."""

    rank: int
    elements: int
    """Of the arena."""
    flats: tuple[Flat, ...]
    """One for each block, in order."""
    steps: tuple[Step, ...]
    weights: tuple[Weight, ...]
    traffic: Traffic
    """In bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReshardPlan:
    """How one model goes from a training layout to a generation layout; equal on every rank."""

    placement: GenerationPlacement
    blocks: tuple[Block, ...]
    order: HopOrder
    ranks_per_node: int | None
    """None: all ranks share one node."""
    element_bytes: int
    bucket_bytes: int

    @property
    def source(self) -> ParallelLayout:
        """The training layout."""
        return self.placement.source

    def node(self, rank: int) -> int:
        """Number of the node that a rank is on."""
        return 0 if self.ranks_per_node is None else rank // self.ranks_per_node


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of a shape, in elements."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))

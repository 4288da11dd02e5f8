"""The one place that computes one rank's arena, transfers and weights from a reshard plan. Pure."""

from collections.abc import Iterator, Sequence
from math import prod

from megachat.model.specs import TensorSpec
from megachat.parallel.layout import Axis
from megachat.reshard.blocks import Area, padded_elements
from megachat.reshard.records import (
    Exchange,
    Flat,
    Gather,
    HopOrder,
    Piece,
    RankPlan,
    ReshardPlan,
    Scope,
    Step,
    Traffic,
    View,
    Weight,
    contiguous_strides,
)

_BLOCK_ALIGNMENT = 128
"""Elements to which the start of a block is aligned: at least 256 bytes."""


def plan_rank(plan: ReshardPlan, rank: int) -> RankPlan:
    """The part of one rank.

    Raises:
        LayoutError: The rank is outside the layout.
    """
    return _RankPlanner(plan, rank).build()


class _RankPlanner:
    """Computes a `RankPlan`; holds what all of its parts need."""

    def __init__(self, plan: ReshardPlan, rank: int) -> None:
        placement = plan.placement
        here = plan.source.coordinate(rank)
        self.plan = plan
        self.rank = rank
        self.stage = here.pipeline
        self.stages = plan.source.pipeline
        self.tiles, self.tile = placement.tiles, placement.tile(rank)
        self.splits, self.split = placement.splits, placement.split(rank)
        self.pipeline_ranks = plan.source.ranks_along(Axis.PIPELINE, rank)
        self.offsets: dict[tuple[int, int], int] = {}
        self.elements = self._arrange()

    def build(self) -> RankPlan:
        """Everything."""
        steps = tuple(
            Step(block=block.name, layer=block.layer, transfers=tuple(self._transfers(index)))
            for index, block in enumerate(self.plan.blocks)
        )
        return RankPlan(
            rank=self.rank,
            elements=self.elements,
            flats=tuple(self._flat(index) for index in range(len(self.plan.blocks))),
            steps=steps,
            weights=tuple(self._weights()),
            traffic=self._traffic(steps),
        )

    # Where things lie -----------------------------------------------------------------------------

    def _arrange(self) -> int:
        """Lays blocks, areas and slots out one after the other; returns the size of the arena.

        Slots of a block touch each other even where DeepSpeed pads its flat buffers: the padding of
        a buffer lies over the slots behind it, which are foreign and dead during training, and
        behind the last one the block leaves room.
        """
        cursor = 0
        for index, block in enumerate(self.plan.blocks):
            at = -(-cursor // _BLOCK_ALIGNMENT) * _BLOCK_ALIGNMENT
            cursor = at
            for number, area in enumerate(block.areas):
                self.offsets[index, number] = at
                last_slot = at + (self._slots(area) - 1) * area.elements
                if self.splits == 1 or self.stage in area.holders:
                    padded = padded_elements(area.elements, self.plan.source)
                    cursor = max(cursor, last_slot + padded)
                at += self._area_elements(area)
            cursor = max(cursor, at)
        return -(-cursor // _BLOCK_ALIGNMENT) * _BLOCK_ALIGNMENT

    def _slots(self, area: Area) -> int:
        """Training shards side by side in an area of this rank's arena."""
        return self.tiles if area.sharded else 1

    def _area_elements(self, area: Area) -> int:
        """Elements of an area in this rank's arena."""
        if area.sharded and self.splits > 1 and self.stage not in area.holders:
            return area.elements // self.splits
        return area.elements * self._slots(area)

    def _own_slot(self, index: int, number: int) -> View:
        """The slot of this rank's column of tensor ranks in an area, whoever trains it."""
        area = self.plan.blocks[index].areas[number]
        shift = self.tile * area.elements if area.sharded else 0
        return _range(self.offsets[index, number] + shift, area.elements)

    def _flat(self, index: int) -> Flat:
        """The optimizer's buffer for a block."""
        for number, area in enumerate(self.plan.blocks[index].areas):
            if self.stage in area.holders:
                return Flat(
                    names=tuple(spec.name for spec in area.specs),
                    offset=self._own_slot(index, number).offset,
                    elements=area.elements,
                    padded_elements=padded_elements(area.elements, self.plan.source),
                )
        return Flat(names=(), offset=0, elements=0, padded_elements=0)

    # Transfers ------------------------------------------------------------------------------------

    def _transfers(self, index: int) -> Iterator[Gather | Exchange]:
        """The transfers of one block, in order."""
        block = self.plan.blocks[index]
        if self.splits > 1 and block.sharded:
            yield from self._exchanges(index)
        elif block.is_uniform(self.stages):
            yield from self._uniform_gathers(index)
        else:
            yield from self._exchanges(index)
            yield from self._tile_gathers(index)

    def _uniform_gathers(self, index: int) -> Iterator[Gather]:
        """Gathers of a block of which each stage trains an equal part."""
        block, areas = self.plan.blocks[index], range(self.stages)
        direct = self.plan.order is HopOrder.DIRECT or 1 in (self.stages, self.tiles)
        if block.sharded and direct:
            if self.stages * self.tiles > 1:
                slots = [view for number in areas for view in self._tile_slots(index, number)]
                yield Gather(scope=Scope.GATHER, slots=tuple(slots))
            return
        if self.stages > 1:
            slots = [self._own_slot(index, number) for number in areas]
            yield Gather(scope=Scope.PIPELINE, slots=tuple(slots))
        yield from self._tile_gathers(index)

    def _tile_gathers(self, index: int) -> Iterator[Gather]:
        """Gathers among the tiles of each sharded area."""
        block = self.plan.blocks[index]
        if block.sharded and self.tiles > 1:
            for number in range(len(block.areas)):
                yield Gather(scope=Scope.TILES, slots=tuple(self._tile_slots(index, number)))

    def _tile_slots(self, index: int, number: int) -> list[View]:
        """All slots of a sharded area."""
        start = self.offsets[index, number]
        elements = self.plan.blocks[index].areas[number].elements
        return [_range(start + tile * elements, elements) for tile in range(self.tiles)]

    def _exchanges(self, index: int) -> Iterator[Exchange]:
        """Transfers from the stages that train an area to those that do not.

        All ranks have the same number of them, some perhaps empty.
        """
        rounds: list[tuple[list[Piece], list[Piece]]] = []
        for number, area in enumerate(self.plan.blocks[index].areas):
            for target, source in self._suppliers(area).items():
                for position, view in enumerate(self._pieces(index, number, target)):
                    if position == len(rounds):
                        rounds.append(([], []))
                    if source == self.stage:
                        rounds[position][0].append(Piece(stage=target, view=view))
                    elif target == self.stage:
                        rounds[position][1].append(Piece(stage=source, view=view))
        for sends, receives in rounds:
            yield Exchange(sends=tuple(sends), receives=tuple(receives))

    def _suppliers(self, area: Area) -> dict[int, int]:
        """Stage that lacks an area -> stage that sends it: of the same node if any, by turns."""
        lacking = [stage for stage in range(self.stages) if stage not in area.holders]
        suppliers = {}
        for turn, stage in enumerate(lacking):
            node = self.plan.node(self.pipeline_ranks[stage])
            near = [h for h in area.holders if self.plan.node(self.pipeline_ranks[h]) == node]
            holders = near or area.holders
            suppliers[stage] = holders[turn % len(holders)]
        return suppliers

    def _pieces(self, index: int, number: int, target: int) -> Iterator[View]:
        """What a stage that lacks an area needs of it, as views of this rank's arena."""
        area = self.plan.blocks[index].areas[number]
        if not area.sharded or self.splits == 1:
            yield self._own_slot(index, number)
            return
        start, wanted = self.offsets[index, number], area.elements // self.splits
        split = self.plan.placement.split(self.pipeline_ranks[target])
        (spec,) = area.specs
        if spec.shard_dim == 0:
            receiving = self.stage == target
            yield _range(start if receiving else start + split * wanted, wanted)
            return
        rows, columns = spec.local_shape(self.plan.source.tensor)
        part = columns // self.splits
        at_once = self._rows_at_once(area, part)
        for row in range(0, rows, at_once):
            shape = (min(at_once, rows - row), part)
            if self.stage == target:
                yield _range(start + row * part, prod(shape))
            else:
                offset = start + row * columns + split * part
                yield View(offset=offset, shape=shape, strides=(columns, 1))

    def _rows_at_once(self, area: Area, columns: int) -> int:
        """Rows of a column slice that are packed in one round; equal for sender and receiver."""
        ranks = [self.pipeline_ranks[stage] for stage in self._suppliers(area)]
        copies = len({self.plan.placement.split(rank) for rank in ranks})
        row_bytes = max(1, copies) * columns * self.plan.element_bytes
        return max(1, self.plan.bucket_bytes // row_bytes)

    # What generation reads ------------------------------------------------------------------------

    def _weights(self) -> Iterator[Weight]:
        """The parameters of the generation shard."""
        for index, block in enumerate(self.plan.blocks):
            for number, area in enumerate(block.areas):
                at = self.offsets[index, number]
                for spec in area.specs:
                    yield Weight(spec=spec, view=self._weight_view(spec, area, at))
                    at += prod(spec.local_shape(self.plan.source.tensor))

    def _weight_view(self, spec: TensorSpec, area: Area, at: int) -> View:
        """The generation shard of a parameter that starts at `at`."""
        local = spec.local_shape(self.plan.source.tensor)
        if spec.shard_dim is None:
            return _whole(at, local)
        if spec.shard_dim == 0:
            shape = (local[0] * self.tiles // self.splits, *local[1:])
            held = self.splits > 1 and self.stage in area.holders
            return _whole(at + (self.split * prod(shape) if held else 0), shape)
        rows, columns = local
        part = columns // self.splits
        if self.splits > 1 and self.stage in area.holders:
            strides = (rows * columns, columns, 1)
            return View(offset=at + self.split * part, shape=(1, rows, part), strides=strides)
        return _whole(at, (self.tiles, rows, part))

    # Bytes ----------------------------------------------------------------------------------------

    def _traffic(self, steps: Sequence[Step]) -> Traffic:
        received = inter_node = sent = 0
        for transfer in (transfer for step in steps for transfer in step.transfers):
            if isinstance(transfer, Gather):
                ranks = self._ranks(transfer.scope)
                sent += transfer.slots[0].elements * (len(ranks) - 1)
                sizes = [slot.elements for slot in transfer.slots]
            else:
                ranks = tuple(self.pipeline_ranks[piece.stage] for piece in transfer.receives)
                sent += sum(piece.view.elements for piece in transfer.sends)
                sizes = [piece.view.elements for piece in transfer.receives]
            for rank, size in zip(ranks, sizes, strict=True):
                received += size if rank != self.rank else 0
                inter_node += size if self.plan.node(rank) != self.plan.node(self.rank) else 0
        shard, kept, redundant = self._kept()
        unit = self.plan.element_bytes
        return Traffic(
            received=received * unit,
            received_inter_node=inter_node * unit,
            sent=sent * unit,
            lower_bound=(shard - kept) * unit,
            redundant=redundant * unit,
            staged=self._staged_bytes(steps),
            shard=shard * unit,
        )

    def _staged_bytes(self, steps: Sequence[Step]) -> int:
        """Everything that is packed, up to a bucket (a single row may exceed a tiny bucket)."""
        staged = [step.staged_elements * self.plan.element_bytes for step in steps]
        return min(sum(staged), max(self.plan.bucket_bytes, *staged))

    def _ranks(self, scope: Scope) -> tuple[int, ...]:
        if scope is Scope.PIPELINE:
            return self.pipeline_ranks
        placement = self.plan.placement
        among_tiles = scope is Scope.TILES
        return placement.tile_group(self.rank) if among_tiles else placement.gather_group(self.rank)

    def _kept(self) -> tuple[int, int, int]:
        """(generation shard, its part in the training shard, the rest of the training shard)."""
        shard = kept = redundant = 0
        for area in (area for block in self.plan.blocks for area in block.areas):
            parts = (self.tiles, self.splits) if area.sharded else (1, 1)
            shard += area.elements * parts[0] // parts[1]
            if self.stage in area.holders:
                kept += area.elements // parts[1]
                redundant += area.elements - area.elements // parts[1]
        return shard, kept, redundant


def _range(offset: int, elements: int) -> View:
    """Neighbouring elements as one dimension."""
    return View(offset=offset, shape=(elements,), strides=(1,))


def _whole(offset: int, shape: tuple[int, ...]) -> View:
    """A contiguous tensor."""
    return View(offset=offset, shape=shape, strides=contiguous_strides(shape))

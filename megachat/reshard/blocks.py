"""The one place for how the parameters of a model are grouped into blocks of the weight arena.

A block is one parameter group of the optimizer and one bucket of the reshard. Each matrix and each
sharded bias of a layer has a block of its own: then the tiles of a generation shard are neighbours,
and a column-parallel weight of all tiles is one contiguous matrix. Pure.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from megachat.errors import LayoutError
from megachat.model.specs import Placement, TensorSpec
from megachat.parallel.layout import ParallelLayout

FLAT_ALIGNMENT = 2
"""DeepSpeed pads each flat buffer to a multiple of this many elements per data rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Area:
    """Parameters that the same pipeline stages hold, one after the other in memory."""

    specs: tuple[TensorSpec, ...]
    """Exactly one where sharded."""
    holders: tuple[int, ...]
    """Stages that train a copy: two for a tied embedding, otherwise one."""
    sharded: bool
    """Whether tensor ranks hold different parts."""
    elements: int
    """On one training rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One parameter group on every rank; a stage holds at most one of its areas."""

    name: str
    areas: tuple[Area, ...]
    decays: bool
    """Whether weight decay applies."""
    layer: int | None
    """Position of the layer within each stage; None outside the layers."""

    @property
    def sharded(self) -> bool:
        """Whether tensor ranks hold different parts."""
        return self.areas[0].sharded

    def held_by(self, stage: int) -> Area | None:
        """The area that a stage trains, if any."""
        return next((area for area in self.areas if stage in area.holders), None)

    def is_uniform(self, pipeline: int) -> bool:
        """Whether each of the stages holds one area, in stage order, all of one size."""
        in_order = tuple((stage,) for stage in range(pipeline))
        return (
            tuple(area.holders for area in self.areas) == in_order
            and len({area.elements for area in self.areas}) == 1
        )


def padded_elements(elements: int, layout: ParallelLayout) -> int:
    """Size of DeepSpeed's flat buffer for parameters of `elements` elements in total."""
    unit = FLAT_ALIGNMENT * layout.data
    return -(-elements // unit) * unit


def build_blocks(specs: Sequence[TensorSpec], *, layout: ParallelLayout) -> tuple[Block, ...]:
    """Groups the parameters of a model; equal on every rank.

    What every layer needs comes first (embeddings, norms), then the layers in order: position i
    stands for the i-th layer of each stage.

    Raises:
        LayoutError: The layers cannot be dealt evenly to the stages.
    """
    layers = 1 + max((spec.layer for spec in specs if spec.layer is not None), default=-1)
    if layers % layout.pipeline:
        raise LayoutError(
            f"{layers} layers are not a multiple of pipeline degree {layout.pipeline} of layout "
            f"{layout}: choose a pipeline degree that divides {layers}"
        )
    edges = [spec for spec in specs if spec.layer is None]
    inner = [spec for spec in specs if spec.layer is not None]
    return (
        *_edge_blocks(edges, layout),
        *_replicated_layer_blocks(inner, layers, layout),
        *_sharded_layer_blocks(inner, layers, layout),
    )


def _edge_blocks(specs: Sequence[TensorSpec], layout: ParallelLayout) -> Iterable[Block]:
    """A block for each sharded parameter, and one for the others of each kind of decay."""
    for spec in specs:
        if spec.shard_dim is not None:
            area = _area([spec], _holders(spec, layout), layout)
            yield Block(name=spec.name, areas=(area,), decays=spec.decays, layer=None)
    for decays in (True, False):
        by_holders: dict[tuple[int, ...], list[TensorSpec]] = {}
        for spec in specs:
            if spec.shard_dim is None and spec.decays is decays:
                by_holders.setdefault(_holders(spec, layout), []).append(spec)
        if by_holders:
            yield Block(
                name=f"edges.{'matrices' if decays else 'vectors'}",
                areas=tuple(
                    _area(members, holders, layout) for holders, members in by_holders.items()
                ),
                decays=decays,
                layer=None,
            )


def _replicated_layer_blocks(
    specs: Sequence[TensorSpec], layers: int, layout: ParallelLayout
) -> Iterable[Block]:
    """One block for what tensor ranks hold alike in all layers of a stage."""
    share = layers // layout.pipeline
    for decays in (True, False):
        chosen = [spec for spec in specs if spec.shard_dim is None and spec.decays is decays]
        if chosen:
            yield Block(
                name=f"layers.{'matrices' if decays else 'vectors'}",
                areas=tuple(
                    _area([s for s in chosen if _stage(s, share) == stage], (stage,), layout)
                    for stage in range(layout.pipeline)
                ),
                decays=decays,
                layer=None,
            )


def _sharded_layer_blocks(
    specs: Sequence[TensorSpec], layers: int, layout: ParallelLayout
) -> Iterable[Block]:
    """One block for each sharded parameter at each position within a stage."""
    share = layers // layout.pipeline
    rows: dict[tuple[int, str], list[TensorSpec]] = {}
    for spec in specs:
        if spec.shard_dim is not None and spec.layer is not None:
            part = spec.name.removeprefix(f"layers.{spec.layer}.")
            rows.setdefault((spec.layer % share, part), []).append(spec)
    for (position, part), members in rows.items():
        yield Block(
            name=f"layers.{position}.{part}",
            areas=tuple(_area([spec], (_stage(spec, share),), layout) for spec in members),
            decays=members[0].decays,
            layer=position,
        )


def _area(specs: Sequence[TensorSpec], holders: tuple[int, ...], layout: ParallelLayout) -> Area:
    return Area(
        specs=tuple(specs),
        holders=holders,
        sharded=specs[0].shard_dim is not None,
        elements=sum(prod(spec.local_shape(layout.tensor)) for spec in specs),
    )


def _holders(spec: TensorSpec, layout: ParallelLayout) -> tuple[int, ...]:
    """Stages that train a parameter outside the layers."""
    last = layout.pipeline - 1
    if spec.placement is Placement.LAST_STAGE:
        return (last,)
    return (0, last) if spec.tied and last else (0,)


def _stage(spec: TensorSpec, share: int) -> int:
    assert spec.layer is not None
    return spec.layer // share

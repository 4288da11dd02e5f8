"""The one place that decides how training shards become generation shards in place.

`build_reshard_plan` is pure: specifications and layouts in, records out. Every rank's part can be
computed alone (`plan_rank`), so a plan for 512 ranks needs no process group and no memory.
"""

from collections.abc import Sequence

from megachat.errors import LayoutError
from megachat.model.config import Head, OptConfig, vocab_multiple_for
from megachat.model.specs import TensorSpec, parameter_specs
from megachat.parallel.layout import (
    Axis,
    GenerationPlacement,
    ParallelLayout,
    nearest_degrees,
)
from megachat.reshard.blocks import build_blocks
from megachat.reshard.rank_plan import plan_rank
from megachat.reshard.records import HopOrder, NodeSpan, RankPlan, ReshardPlan, Traffic

__all__ = [
    "DEFAULT_BUCKET_BYTES",
    "HopOrder",
    "NodeSpan",
    "RankPlan",
    "ReshardPlan",
    "Traffic",
    "build_reshard_plan",
    "legal_degrees",
    "plan_for_model",
    "plan_rank",
    "total_traffic",
]

DEFAULT_BUCKET_BYTES = 64 * 2**20
"""Most that a transfer may stage outside the arena."""


def build_reshard_plan(
    specs: Sequence[TensorSpec],
    *,
    source: ParallelLayout,
    target: ParallelLayout,
    ranks_per_node: int | None = None,
    node_span: NodeSpan = NodeSpan.REFUSE,
    element_bytes: int = 2,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> ReshardPlan:
    """Plans the way from a training layout to a tensor-only generation layout.

    Args:
        specs: Parameters of the whole model, the vocabulary padded for both tensor degrees.
        source: Training layout.
        target: Generation layout; pipeline degree 1, the same world.
        ranks_per_node: Neighbouring ranks that share a node; None: all of them.
        node_span: Whether a generation tensor group may span nodes.
        element_bytes: Bytes of one parameter.
        bucket_bytes: Most that one transfer may stage outside the arena (only a generation degree
            above the training degree stages at all).

    Raises:
        LayoutError: The layouts do not nest, the parameters cannot be cut, or a generation group
            spans nodes; names the nearest legal degrees.
    """
    _check_target(source, target)
    legal = legal_degrees(specs, source=source, ranks_per_node=ranks_per_node, node_span=node_span)
    if target.tensor not in legal:
        raise LayoutError(
            f"{_refusal(specs, source, target.tensor, ranks_per_node)}; nearest legal generation "
            f"tensor degrees: {nearest_degrees(target.tensor, legal)}"
        )
    placement = GenerationPlacement(source=source, tensor=target.tensor)
    return ReshardPlan(
        placement=placement,
        blocks=build_blocks(specs, layout=source),
        order=_best_order(placement, ranks_per_node),
        ranks_per_node=ranks_per_node,
        element_bytes=element_bytes,
        bucket_bytes=bucket_bytes,
    )


def plan_for_model(
    config: OptConfig,
    *,
    source: ParallelLayout,
    target: ParallelLayout,
    head: Head = Head.LANGUAGE_MODEL,
    ranks_per_node: int | None = None,
    node_span: NodeSpan = NodeSpan.REFUSE,
    element_bytes: int = 2,
) -> ReshardPlan:
    """`build_reshard_plan` for an architecture, checked against its heads and MLP too.

    The model must be built with `ModelOptions.vocab_multiple` =
    `vocab_multiple_for(source.tensor, target.tensor)`.

    Raises:
        LayoutError: As `build_reshard_plan`, or a layout does not cut the model into equal parts.
    """
    config.validate_layout(source)
    config.validate_layout(target)
    multiple = vocab_multiple_for(source.tensor, target.tensor)
    return build_reshard_plan(
        parameter_specs(config, tensor=source.tensor, head=head, vocab_multiple=multiple),
        source=source,
        target=target,
        ranks_per_node=ranks_per_node,
        node_span=node_span,
        element_bytes=element_bytes,
    )


def legal_degrees(
    specs: Sequence[TensorSpec],
    *,
    source: ParallelLayout,
    ranks_per_node: int | None = None,
    node_span: NodeSpan = NodeSpan.REFUSE,
) -> tuple[int, ...]:
    """Generation tensor degrees that a training layout can be resharded to, ascending."""
    return tuple(
        degree
        for degree in GenerationPlacement.legal_degrees(source)
        if _uncut(specs, degree) is None
        and (node_span is NodeSpan.ALLOW or _spanning_group(source, degree, ranks_per_node) is None)
    )


def _check_target(source: ParallelLayout, target: ParallelLayout) -> None:
    """Generation has no pipeline and the same ranks."""
    if target.pipeline != 1:
        raise LayoutError(
            f"generation layout {target} has pipeline degree {target.pipeline}: generation has no "
            f"pipeline, use tensor {target.tensor} and pipeline 1"
        )
    if target.world_size != source.world_size:
        raise LayoutError(
            f"generation layout {target} has {target.world_size} ranks and training layout "
            f"{source} has {source.world_size}: both must fill the same world"
        )


def _refusal(
    specs: Sequence[TensorSpec], source: ParallelLayout, degree: int, ranks_per_node: int | None
) -> str:
    """Why a degree is not legal."""
    if degree not in GenerationPlacement.legal_degrees(source):
        return (
            f"generation tensor degree {degree} neither divides nor is a multiple of tensor degree "
            f"{source.tensor} of training layout {source}"
        )
    spec = _uncut(specs, degree)
    if spec is not None:
        assert spec.shard_dim is not None
        advice = (
            f" (build the model with vocab_multiple={vocab_multiple_for(source.tensor, degree)})"
            if spec.padding
            else ""
        )
        return (
            f"generation tensor degree {degree} does not divide {spec.name} of size "
            f"{spec.shape[spec.shard_dim]} in dimension {spec.shard_dim}{advice}"
        )
    group = _spanning_group(source, degree, ranks_per_node)
    return (
        f"generation tensor degree {degree} spans nodes: ranks {group} with {ranks_per_node} ranks "
        "on a node"
    )


def _uncut(specs: Sequence[TensorSpec], degree: int) -> TensorSpec | None:
    """A parameter that does not divide into `degree` equal parts."""
    cut = (spec for spec in specs if spec.shard_dim is not None)
    return next((spec for spec in cut if spec.shape[spec.shard_dim or 0] % degree), None)


def _spanning_group(
    source: ParallelLayout, degree: int, ranks_per_node: int | None
) -> tuple[int, ...] | None:
    """A generation tensor group that is not on one node."""
    if ranks_per_node is None:
        return None
    placement = GenerationPlacement(source=source, tensor=degree)
    for rank in range(source.world_size):
        group = placement.tensor_group(rank)
        if len({member // ranks_per_node for member in group}) > 1:
            return group
    return None


def _best_order(placement: GenerationPlacement, ranks_per_node: int | None) -> HopOrder:
    """The order that moves fewest bytes between nodes; in doubt the one with fewer transfers."""
    if ranks_per_node is None or placement.tiles == 1 or placement.source.pipeline == 1:
        return HopOrder.DIRECT
    direct = stages_first = 0
    for rank in range(placement.source.world_size):
        node = rank // ranks_per_node
        stages = placement.source.ranks_along(Axis.PIPELINE, rank)
        tiles = placement.tile_group(rank)
        direct += _abroad(placement.gather_group(rank), node, ranks_per_node)
        stages_first += _abroad(stages, node, ranks_per_node)
        stages_first += len(stages) * _abroad(tiles, node, ranks_per_node)
    return HopOrder.STAGES_FIRST if stages_first < direct else HopOrder.DIRECT


def _abroad(ranks: Sequence[int], node: int, ranks_per_node: int) -> int:
    """How many of the ranks are on other nodes."""
    return sum(rank // ranks_per_node != node for rank in ranks)


def total_traffic(plan: ReshardPlan) -> Traffic:
    """Sum over all ranks; `staged` is the most of any rank."""
    parts = [plan_rank(plan, rank).traffic for rank in range(plan.source.world_size)]
    return Traffic(
        received=sum(part.received for part in parts),
        received_inter_node=sum(part.received_inter_node for part in parts),
        sent=sum(part.sent for part in parts),
        lower_bound=sum(part.lower_bound for part in parts),
        redundant=sum(part.redundant for part in parts),
        staged=max(part.staged for part in parts),
        shard=sum(part.shard for part in parts),
    )

"""The one place that asks the reshard plan for bytes: size of the arena, received, between nodes.

The plan of a model with many layers is that of a small one with more of the same, so plans are made
for one and for two layers a stage and extended, which is exact and fast enough for a search over
layouts.
"""

from dataclasses import dataclass, replace
from functools import cache

from megachat.model.config import OptConfig
from megachat.parallel.layout import ParallelLayout
from megachat.planner.hardware import ClusterConfig
from megachat.planner.job import Job
from megachat.reshard.plan import HopOrder, ReshardPlan, plan_for_model, plan_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTraffic:
    """Bytes of one reshard for one rank of a pipeline stage; the way back moves none."""

    arena: int
    """Memory of own and foreign blocks together."""
    received: int
    received_inter_node: int
    sent: int
    lower_bound: int
    """Generation shard less what the rank trains of it."""
    redundant: int
    """Of the training shard, outside the generation shard (generation degree above training's)."""

    @property
    def received_intra_node(self) -> int:
        """Received from ranks of the same node."""
        return self.received - self.received_inter_node


@dataclass(frozen=True, kw_only=True, slots=True)
class ReshardTraffic:
    """Bytes of one reshard, by pipeline stage."""

    order: HopOrder
    stages: tuple[StageTraffic, ...]

    @property
    def largest(self) -> StageTraffic:
        """The stage that receives most."""
        return max(self.stages, key=lambda stage: (stage.received_inter_node, stage.received))


def reshard_traffic(job: Job, cluster: ClusterConfig) -> ReshardTraffic:
    """Bytes that the actor's reshard moves.

    Raises:
        LayoutError: The layouts do not nest, or a generation group would span nodes.
    """
    return _traffic(
        job.actor.config,
        job.actor.layout,
        job.generation_layout,
        cluster.gpus_per_node,
        job.actor.value_bytes,
    )


@cache
def _traffic(
    config: OptConfig,
    source: ParallelLayout,
    target: ParallelLayout,
    ranks_per_node: int,
    element_bytes: int,
) -> ReshardTraffic:
    def plan(layers_per_stage: int) -> ReshardPlan:
        return plan_for_model(
            replace(config, layers=layers_per_stage * source.pipeline),
            source=source,
            target=target,
            ranks_per_node=ranks_per_node,
            element_bytes=element_bytes,
        )

    one, two = plan(1), plan(2)
    layers = config.layers // source.pipeline
    first_ranks = range(0, source.world_size, source.tensor * source.data)
    return ReshardTraffic(
        order=one.order,
        stages=tuple(
            _extended(_stage_traffic(one, rank), _stage_traffic(two, rank), times=layers - 1)
            for rank in first_ranks
        ),
    )


def _stage_traffic(plan: ReshardPlan, rank: int) -> StageTraffic:
    part = plan_rank(plan, rank)
    return StageTraffic(
        arena=part.elements * plan.element_bytes,
        received=part.traffic.received,
        received_inter_node=part.traffic.received_inter_node,
        sent=part.traffic.sent,
        lower_bound=part.traffic.lower_bound,
        redundant=part.traffic.redundant,
    )


def _extended(one: StageTraffic, two: StageTraffic, *, times: int) -> StageTraffic:
    """`one`, plus `times` the difference that one more layer a stage makes."""
    return StageTraffic(
        arena=one.arena + times * (two.arena - one.arena),
        received=one.received + times * (two.received - one.received),
        received_inter_node=one.received_inter_node
        + times * (two.received_inter_node - one.received_inter_node),
        sent=one.sent + times * (two.sent - one.sent),
        lower_bound=one.lower_bound + times * (two.lower_bound - one.lower_bound),
        redundant=one.redundant + times * (two.redundant - one.redundant),
    )

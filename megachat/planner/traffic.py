"""The one place for the bytes that a reshard moves: predicted in closed form, or read off the plan.

A search needs thousands of answers, and the closed form is one subtraction: a rank receives its
generation shard less what it trains of it. A chosen layout is shown with the numbers of the reshard
plan itself (`reshard.plan`), which must be the same (`tests/planner/test_traffic.py`).
"""

from dataclasses import dataclass

from megachat.planner.hardware import ClusterConfig
from megachat.planner.job import Job
from megachat.planner.sizes import generation_elements, received_between_nodes
from megachat.reshard.plan import plan_for_model, plan_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTraffic:
    """Bytes of one reshard for one rank of a pipeline stage; the way back moves none."""

    stage: int
    shard: int
    """The generation shard."""
    received: int
    received_inter_node: int
    redundant: int
    """Of the training shard, outside the generation shard (generation degree above training's)."""

    @property
    def received_intra_node(self) -> int:
        """Received from ranks of the same node."""
        return self.received - self.received_inter_node


def predicted_traffic(job: Job, cluster: ClusterConfig) -> tuple[StageTraffic, ...]:
    """What one rank of each pipeline stage receives, in closed form."""
    actor, unit = job.actor, job.actor.value_bytes
    traffic = []
    for stage, rank in enumerate(_ranks_by_stage(job)):
        elements = generation_elements(actor, tensor=job.generation_tensor, stage=stage)
        between = received_between_nodes(
            actor,
            tensor=job.generation_tensor,
            rank=rank,
            ranks_per_node=cluster.gpus_per_node,
        )
        traffic.append(
            StageTraffic(
                stage=stage,
                shard=elements.shard * unit,
                received=elements.foreign * unit,
                received_inter_node=between * unit,
                redundant=elements.redundant * unit,
            )
        )
    return tuple(traffic)


def planned_traffic(job: Job, cluster: ClusterConfig) -> tuple[StageTraffic, ...]:
    """The same from the plan that the reshard executes.

    Raises:
        LayoutError: The layouts do not nest, or a generation group would span nodes.
    """
    plan = plan_for_model(
        job.actor.config,
        source=job.actor.layout,
        target=job.generation_layout,
        ranks_per_node=cluster.gpus_per_node,
        element_bytes=job.actor.value_bytes,
    )
    parts = [plan_rank(plan, rank).traffic for rank in _ranks_by_stage(job)]
    return tuple(
        StageTraffic(
            stage=stage,
            shard=part.shard,
            received=part.received,
            received_inter_node=part.received_inter_node,
            redundant=part.redundant,
        )
        for stage, part in enumerate(parts)
    )


def _ranks_by_stage(job: Job) -> range:
    """The first rank of each pipeline stage."""
    layout = job.actor.layout
    return range(0, layout.world_size, layout.tensor * layout.data)

"""The one place for the bytes that a reshard moves, in closed form.

A search needs thousands of answers, and planning every transfer takes a fraction of a second for
each rank. A rank receives its generation shard less what it trains of it; that the reshard plan
(`reshard.plan`) says the same for every layout is a test (`tests/planner/test_traffic.py`).
"""

from dataclasses import dataclass
from functools import lru_cache

from megachat.planner.hardware import ClusterConfig
from megachat.planner.job import Job, RoleSetup
from megachat.planner.sizes import generation_elements, received_between_nodes


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


def reshard_traffic(job: Job, cluster: ClusterConfig) -> tuple[StageTraffic, ...]:
    """What the first rank of each pipeline stage receives."""
    return _traffic(job.actor, job.generation_tensor, cluster.gpus_per_node)


@lru_cache(maxsize=1024)
def _traffic(actor: RoleSetup, tensor: int, ranks_per_node: int) -> tuple[StageTraffic, ...]:
    unit = actor.value_bytes
    first_ranks = range(0, actor.layout.world_size, actor.layout.tensor * actor.layout.data)
    traffic = []
    for stage, rank in enumerate(first_ranks):
        elements = generation_elements(actor, tensor=tensor, stage=stage)
        between = received_between_nodes(
            actor, tensor=tensor, rank=rank, ranks_per_node=ranks_per_node
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

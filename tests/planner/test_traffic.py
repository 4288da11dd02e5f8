"""The closed form against the plan that the reshard executes."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.planner.hardware import GB, cluster_config
from megachat.planner.job import Job
from megachat.planner.traffic import reshard_traffic
from megachat.reshard.plan import NodeSpan, plan_for_model, plan_rank
from tests.planner.jobs import job, jobs


def with_layers(job: Job, per_stage: int) -> Job:
    """The same job with few layers: plans of deep models say nothing new and take long."""
    config = replace(job.actor.config, layers=per_stage * job.actor.layout.pipeline)
    return replace(job, actor=replace(job.actor, config=config))


@settings(deadline=None, max_examples=40)
@given(jobs(), st.integers(1, 3), st.sampled_from([2, 4, 8]))
def test_bytes_are_those_of_the_reshard_plan(job: Job, per_stage: int, gpus: int) -> None:
    job = with_layers(job, per_stage)
    layout = job.actor.layout
    plan = plan_for_model(
        job.actor.config,
        source=layout,
        target=job.generation_layout,
        ranks_per_node=gpus,
        node_span=NodeSpan.ALLOW,
    )
    traffic = reshard_traffic(job, cluster_config(gpus_per_node=gpus))
    spans_nodes = max(layout.tensor, job.generation_tensor) > gpus
    for stage, rank in zip(
        traffic, range(0, layout.world_size, layout.tensor * layout.data), strict=True
    ):
        planned = plan_rank(plan, rank).traffic
        assert stage.shard == planned.shard
        assert stage.received == planned.received == planned.lower_bound
        assert stage.redundant == planned.redundant
        if not spans_nodes:
            assert stage.received_inter_node == planned.received_inter_node


@pytest.mark.parametrize(
    ("size", "layout", "generate", "intra", "inter"),
    [
        ("13b", (8, 1, 8), 4, 3.15, 0.0),
        ("13b", (8, 1, 8), 2, 9.44, 0.0),
        ("66b", (8, 2, 4), 8, 0.0, 8.15),
        ("66b", (8, 2, 4), 4, 16.3, 8.15),
        ("175b", (8, 8, 1), 8, 0.0, 38.05),
        ("175b", (8, 4, 2), 8, 0.0, 32.61),
        ("175b", (8, 8, 1), 4, 43.5, 38.05),
    ],
)
def test_bytes_are_those_of_an_independent_count(
    size: str, layout: tuple[int, int, int], generate: int, intra: float, inter: float
) -> None:
    """Matrices alone, 8 GPUs a node, two hops: within what embeddings and norms add."""
    traffic = reshard_traffic(job(size, *layout, generate=generate), cluster_config(nodes=8))
    most = max(traffic, key=lambda stage: stage.received)
    assert most.received_intra_node / GB == pytest.approx(intra, rel=0.03, abs=0.05)
    assert most.received_inter_node / GB == pytest.approx(inter, rel=0.03, abs=0.05)
    assert most.redundant == 0

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.errors import ConfigError, LayoutError
from megachat.planner.hardware import cluster_config
from megachat.planner.job import Workload
from megachat.training.micro_batches import plan_micro_batches
from tests.planner.jobs import job, role


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 200), data=st.sampled_from([1, 2, 4, 8]), at_once=st.integers(1, 9))
def test_micro_batches_are_counted_as_training_cuts_them(
    rows: int, data: int, at_once: int
) -> None:
    setup = role("125m", 1, 1, data, micro_batch_rows=at_once)
    plan = plan_micro_batches([5] * rows, num_shards=data, rows_per_micro_batch=at_once)
    assert setup.num_micro_batches(rows) == len(plan.shards[0])
    assert setup.rows_at_once(rows) == len(plan.shards[0][0].rows)


def test_sequence_parallelism_has_no_effect_on_one_tensor_rank() -> None:
    assert role("125m", 2, 1, 1).is_sequence_parallel
    assert not role("125m", 1, 1, 2).is_sequence_parallel


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"generate": 3}, LayoutError, "generation tensor degree 3 does not fit"),
        ({"generate": 2, "micro_batch_rows": 0}, ConfigError, "micro_batch_rows is 0"),
        ({"generate": 2, "value_bytes": 3}, ConfigError, "value_bytes is 3"),
    ],
)
def test_what_no_engine_runs_is_refused(
    changes: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        job("125m", 2, 2, 2, **changes)  # type: ignore[arg-type]


def test_a_critic_on_other_ranks_is_refused() -> None:
    good = job("125m", 2, 2, 2, generate=2)
    with pytest.raises(LayoutError, match="has 8 ranks, critic layout tp1.pp1.dp4 has 4"):
        replace(good, critic=role("125m", 1, 1, 4))


def test_rows_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows of 2100 tokens, but the actor has 2048"):
        job("125m", 1, 1, 1, generate=1, workload=Workload(prompt_tokens=1844))


@pytest.mark.parametrize("name", ["prompts", "response_tokens", "sft_rows", "ppo_epochs"])
def test_an_empty_batch_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        Workload(**{name: 0})


def test_minibatches_have_to_divide_the_prompts() -> None:
    with pytest.raises(ConfigError, match="10 prompts cannot be cut into 4"):
        Workload(prompts=10, minibatches=4)


@pytest.mark.parametrize(
    ("nodes", "gpus", "layout", "generate", "message"),
    [
        (1, 4, (2, 2, 2), 2, "has 8 ranks, but 1 nodes x 4 GPUs = 4"),
        (2, 4, (8, 1, 1), 8, "actor tensor degree 8 would span nodes of 4 GPUs"),
        (2, 4, (4, 2, 1), 8, "generation tensor degree 8 would span nodes"),
    ],
)
def test_a_job_has_to_fill_its_cluster_with_tensor_groups_inside_nodes(
    nodes: int, gpus: int, layout: tuple[int, int, int], generate: int, message: str
) -> None:
    cluster = cluster_config(nodes=nodes, gpus_per_node=gpus)
    with pytest.raises(LayoutError, match=message):
        job("1.3b", *layout, generate=generate).check_cluster(cluster)

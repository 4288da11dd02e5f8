"""Predictions against floors that follow from bytes, operations and peaks."""

from dataclasses import replace

import pytest

from megachat.model.config import Recompute
from megachat.planner.hardware import GB, ClusterConfig, cluster_config
from megachat.planner.job import Job, Workload
from megachat.planner.memory import plan_memory
from megachat.planner.records import Measure
from megachat.planner.time import StepSeconds, predict_seconds
from tests.planner.jobs import job

IDEAL = {
    "compute_efficiency": 1.0,
    "memory_efficiency": 1.0,
    "link_efficiency": 1.0,
    "collective_latency_us": 0.0,
}
ROOMY = frozenset({Measure.REUSE_GRADIENTS, Measure.OFFLOAD_OPTIMIZER})


def seconds(
    job: Job, cluster: ClusterConfig, measures: frozenset[Measure] = frozenset()
) -> StepSeconds:
    return predict_seconds(job, cluster, plan_memory(job, cluster, measures))


def test_the_reshard_of_opt_175b_takes_its_wire_time() -> None:
    """38.3 GB per GPU at 25 GB/s."""
    big = job("175b", 8, 8, 1, generate=8)
    assert seconds(big, cluster_config(nodes=8, **IDEAL)).reshard == pytest.approx(1.53, abs=0.01)


def test_a_layout_that_generates_as_it_trains_moves_nothing() -> None:
    same = job("13b", 4, 1, 2, generate=4)
    assert seconds(same, cluster_config(**IDEAL)).reshard == 0.0


def test_decoding_one_sequence_takes_the_time_of_reading_the_weights() -> None:
    """OPT-175B on 8 A100-80: 21.4 ms a token is the floor that publications compare with."""
    work = Workload(prompts=8, prompt_tokens=1, response_tokens=101)
    big = job("175b", 8, 8, 1, generate=8, workload=work)
    cluster = cluster_config(nodes=8, gpu_memory_gb=200.0, **IDEAL, node_link_gbps=1e9)
    assert seconds(big, cluster).decode / 100 == pytest.approx(21.4e-3, rel=0.01)


def test_waves_read_the_weights_again() -> None:
    big = job("175b", 8, 8, 1, generate=8)
    two, one = (
        seconds(big, cluster_config(nodes=8, gpu_memory_gb=size), ROOMY) for size in (84.0, 120.0)
    )
    waves = [
        plan_memory(big, cluster_config(nodes=8, gpu_memory_gb=size), ROOMY).cache.waves
        for size in (84.0, 120.0)
    ]
    assert waves == [2, 1]
    assert one.decode < two.decode < 2 * one.decode


def test_training_time_without_overheads_is_operations_over_the_peak() -> None:
    single = job("1.3b", 1, 1, 1, generate=1, workload=Workload(prompts=64))
    cluster = cluster_config(gpus_per_node=1, **IDEAL)
    config, tokens = single.actor.config, 64 * 512
    least = 6 * (config.num_parameters - 2050 * config.hidden) * tokens / 312e12
    # Attention comes on top of the parameters' products.
    assert least < seconds(single, cluster).actor_training < 1.1 * least


@pytest.mark.parametrize("value_bytes", [2, 4])
def test_data_ranks_exchange_each_gradient_and_each_weight_once(value_bytes: int) -> None:
    """A rank receives 7/8 of its fp32 gradients' bytes, and 7/8 of its weights'."""
    spread = job("1.3b", 1, 1, 8, generate=1, value_bytes=value_bytes)
    slow, fast = (
        seconds(spread, cluster_config(gpu_memory_gb=200.0, **IDEAL, node_link_gbps=speed))
        for speed in (10.0, 1e9)
    )
    wire = 7 / 8 * spread.actor.config.num_parameters * (4 + value_bytes) / (10 * GB)
    assert slow.actor_training - fast.actor_training == pytest.approx(wire, rel=1e-3)


def test_a_deeper_pipeline_waits_longer_for_few_micro_batches() -> None:
    work = Workload(prompts=8)
    cluster = cluster_config(**IDEAL, node_link_gbps=1e9)
    shallow, deep = (
        seconds(job("1.3b", 1, depth, 8 // depth, generate=1, workload=work), cluster)
        for depth in (2, 8)
    )
    assert shallow.actor_training < deep.actor_training


def test_recomputation_costs_a_third_of_the_layers() -> None:
    plain = job("13b", 8, 1, 1, generate=8)
    recomputed = replace(plain, actor=replace(plain.actor, recompute=Recompute.FULL))
    cluster = cluster_config(**IDEAL, node_link_gbps=1e9)
    ratio = seconds(recomputed, cluster).actor_training / seconds(plain, cluster).actor_training
    assert ratio == pytest.approx(4 / 3, abs=0.01)


def test_offloaded_state_travels_both_ways_and_frozen_models_only_back() -> None:
    big = job("175b", 8, 8, 1, generate=8)
    cluster = cluster_config(nodes=8, **IDEAL, host_link_gbps=10.0)
    optimizer, scorers = (
        seconds(big, cluster, frozenset({measure})).offload
        for measure in (Measure.OFFLOAD_OPTIMIZER, Measure.OFFLOAD_SCORERS)
    )
    assert optimizer == pytest.approx(2 * 33.9 * GB / (10 * GB), rel=0.01)
    assert scorers == pytest.approx((5.65 + 0.66) * GB / (10 * GB), rel=0.01)
    assert seconds(big, cluster).offload == 0.0


def test_every_update_of_a_step_is_counted() -> None:
    once = job("1.3b", 1, 1, 8, generate=1)
    thrice = replace(once, workload=Workload(ppo_epochs=3))
    cluster = cluster_config()
    assert seconds(thrice, cluster).actor_training == pytest.approx(
        3 * seconds(once, cluster).actor_training
    )


def test_the_total_is_the_sum_of_the_parts() -> None:
    step = seconds(job("13b", 2, 2, 2, generate=4), cluster_config())
    assert step.total == pytest.approx(
        step.reshard
        + step.offload
        + step.prefill
        + step.decode
        + step.scoring
        + step.actor_training
        + step.critic_training
    )
    assert min(step.prefill, step.decode, step.scoring, step.critic_training) > 0

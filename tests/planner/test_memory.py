import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megachat.errors import CapacityError, LayoutError
from megachat.parallel.layout import ParallelLayout
from megachat.planner.hardware import GB, Allocator, ClusterConfig, cluster_config
from megachat.planner.job import Job, Role, Workload
from megachat.planner.memory import check_plan, plan_fullest, plan_memory, refusal
from megachat.planner.pools import trained_bytes
from megachat.planner.records import (
    Measure,
    MemoryPlan,
    Phase,
    Pool,
    RankMemory,
    Residence,
    rank_ranges,
)
from megachat.planner.reserved import ReservedFor
from tests.planner.jobs import SIZES, job, jobs, role

GIB = 2**30
LONG_LIVED = (Pool.WEIGHTS, Pool.EMBEDDINGS, Pool.GRADIENTS, Pool.MASTERS, Pool.MOMENTS)

measure_sets = st.sets(st.sampled_from(Measure)).map(frozenset)


def cluster_of(job: Job, *, memory_gb: float = 80.0, **values: float) -> ClusterConfig:
    """One node with a GPU for every rank."""
    return cluster_config(
        gpus_per_node=job.actor.layout.world_size, gpu_memory_gb=memory_gb, **values
    )


def cluster_with_budget(job: Job, num_bytes: int) -> ClusterConfig:
    """A cluster whose plans may use exactly so many bytes of a GPU."""
    gigabytes = num_bytes / GB
    while int(gigabytes * GB) < num_bytes:
        gigabytes = math.nextafter(gigabytes, math.inf)
    cluster = cluster_of(job, memory_gb=gigabytes, reserved_gb=0.0, margin=0.0, host_memory_gb=1e6)
    assert cluster.gpu_bytes == num_bytes
    return cluster


def test_static_bytes_of_opt_175b_on_64_ranks_are_the_known_ones() -> None:
    """TP8 x PP8 x DP1: 5.26 GiB parameters, twice that twice in fp32, four times in moments."""
    plan = plan_memory(job("175b", 8, 8, 1, generate=8), cluster_config(nodes=8))
    ppo = plan.ranks[0].phase(Phase.PPO_TRAINING)
    sizes = {pool: ppo.bytes_of(pool, role=Role.ACTOR) / GIB for pool in LONG_LIVED}
    assert sizes[Pool.WEIGHTS] + sizes[Pool.EMBEDDINGS] == pytest.approx(5.26, abs=0.005)
    assert sizes[Pool.GRADIENTS] == pytest.approx(10.51, abs=0.01)
    assert sizes[Pool.MASTERS] == pytest.approx(10.51, abs=0.01)
    assert sizes[Pool.MOMENTS] == pytest.approx(21.02, abs=0.015)


def test_data_ranks_share_masters_and_moments_but_not_gradients() -> None:
    """TP8 x PP4 x DP2: gradients 20.6 GiB, 61.9 in all."""
    plan = plan_memory(job("175b", 8, 4, 2, generate=8), cluster_config(nodes=8))
    ppo = plan.ranks[0].phase(Phase.PPO_TRAINING)
    assert ppo.bytes_of(Pool.GRADIENTS, role=Role.ACTOR) / GIB == pytest.approx(20.64, abs=0.02)
    assert ppo.bytes_of(Pool.MASTERS, role=Role.ACTOR) / GIB == pytest.approx(10.32, abs=0.01)
    total = sum(ppo.bytes_of(pool, role=Role.ACTOR) for pool in LONG_LIVED)
    assert total / GIB == pytest.approx(61.9, abs=0.1)


def test_generation_of_opt_175b_holds_the_known_bytes() -> None:
    """43.6 GB of weights at TP8; the full cache of 1024 x 512 tokens would take 38.7 GB."""
    plan = plan_memory(job("175b", 8, 8, 1, generate=8), cluster_config(nodes=8))
    generation = plan.ranks[0].phase(Phase.GENERATION)
    weights = sum(
        generation.bytes_of(pool, role=Role.ACTOR)
        for pool in (Pool.WEIGHTS, Pool.EMBEDDINGS, Pool.FOREIGN_BLOCKS)
    )
    assert weights / GB == pytest.approx(43.7, abs=0.1)
    full = plan.cache.needed_blocks * plan.cache.block_bytes
    assert full / GB == pytest.approx(38.65, abs=0.1)


@pytest.mark.parametrize("size", SIZES)
def test_long_lived_bytes_are_the_stated_multiples_of_the_parameters(size: str) -> None:
    actor = role(size, 2, 2, 4)
    plan = plan_memory(job(size, 2, 2, 4, generate=2), cluster_config(gpus_per_node=16))
    whole = actor.config.num_parameters
    held = sum(
        memory.phase(Phase.SFT).bytes_of(Pool.GRADIENTS) // 4 * len(memory.ranks)
        for memory in plan.ranks
    )
    # Each of the 4 data ranks holds the model once; the tied embedding, what tensor ranks hold
    # alike and padding come on top.
    assert whole <= held / 4 <= 1.4 * whole
    for memory in plan.ranks:
        sft = memory.phase(Phase.SFT)
        weights = sft.bytes_of(Pool.WEIGHTS) + sft.bytes_of(Pool.EMBEDDINGS)
        assert sft.bytes_of(Pool.GRADIENTS) == 2 * weights
        assert sft.bytes_of(Pool.MASTERS) == pytest.approx(2 * weights / 4, abs=4)
        assert sft.bytes_of(Pool.MOMENTS) == 2 * sft.bytes_of(Pool.MASTERS)


def test_an_fp32_model_has_fp32_weights_and_gradients_of_its_whole_shard_once() -> None:
    plan = plan_memory(
        job("125m", 1, 1, 2, generate=1, value_bytes=4), cluster_config(gpus_per_node=2)
    )
    sft = plan.ranks[0].phase(Phase.SFT)
    weights = sft.bytes_of(Pool.WEIGHTS) + sft.bytes_of(Pool.EMBEDDINGS)
    assert sft.bytes_of(Pool.MASTERS) == weights // 2
    assert sft.bytes_of(Pool.GRADIENTS) == weights


@settings(deadline=None, max_examples=60)
@given(jobs(), measure_sets)
def test_pools_sum_to_the_totals_and_no_bytes_get_lost(
    job: Job, measures: frozenset[Measure]
) -> None:
    plan = plan_memory(job, cluster_of(job), measures)
    assert sorted(rank for memory in plan.ranks for rank in memory.ranks) == list(
        range(job.actor.layout.world_size)
    )
    for memory in plan.ranks:
        generation, training = (
            memory.phase(phase) for phase in (Phase.GENERATION, Phase.PPO_TRAINING)
        )
        for phase in memory.phases:
            everything = sum(item.num_bytes for item in phase.pools)
            assert everything == sum(phase.total(residence) for residence in Residence)
            assert all(item.num_bytes > 0 for item in phase.pools)
            keys = [(item.role, item.pool, item.residence) for item in phase.pools]
            assert len(keys) == len(set(keys))
        for role_ in Role:
            for pool in LONG_LIVED:
                generating, trained = (
                    sum(
                        phase.bytes_of(pool, role=role_, residence=residence)
                        for residence in Residence
                    )
                    for phase in (generation, training)
                )
                assert generating == trained
        borrowed = generation.bytes_of(Pool.FOREIGN_BLOCKS) + generation.bytes_of(Pool.KV_CACHE)
        assert generation.total(Residence.LENT) <= borrowed


@settings(deadline=None, max_examples=60)
@given(jobs(), measure_sets, st.floats(5.0, 300.0), st.floats(1.0, 300.0))
def test_more_memory_never_makes_a_plan_worse(
    job: Job, measures: frozenset[Measure], memory_gb: float, more_gb: float
) -> None:
    less, more = (
        plan_memory(job, cluster_of(job, memory_gb=size), measures)
        for size in (memory_gb, memory_gb + more_gb)
    )
    assert less.cache.num_blocks <= more.cache.num_blocks <= more.cache.needed_blocks
    assert less.cache.waves >= more.cache.waves >= 1
    assert more.fits or not less.fits


@settings(deadline=None, max_examples=60)
@given(jobs(), measure_sets)
def test_a_plan_is_refused_exactly_when_its_peak_exceeds_the_budget(
    job: Job, measures: frozenset[Measure]
) -> None:
    smallest = plan_memory(job, cluster_with_budget(job, 1), measures).peak_bytes
    enough = plan_memory(job, cluster_with_budget(job, smallest), measures)
    assert enough.fits and refusal(enough) is None
    check_plan(enough)
    short = plan_memory(job, cluster_with_budget(job, smallest - 1), measures)
    assert not short.fits
    assert short.peak_bytes == smallest
    with pytest.raises(CapacityError, match=f"phase {short.fullest.peak.phase} needs"):
        check_plan(short)


@settings(deadline=None, max_examples=40)
@given(jobs(), measure_sets)
def test_measures_only_ever_make_room(job: Job, measures: frozenset[Measure]) -> None:
    without, with_measures = (
        plan_memory(job, cluster_with_budget(job, 1), chosen) for chosen in (frozenset(), measures)
    )
    for before, after in zip(without.ranks, with_measures.ranks, strict=True):
        for phase in Phase:
            assert after.phase(phase).total() <= before.phase(phase).total()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SIZES), st.sampled_from([1, 2, 4]), st.integers(1, 16), st.integers(1, 16))
def test_more_data_ranks_never_need_more_optimizer_bytes(
    size: str, tensor: int, data: int, more: int
) -> None:
    assert trained_bytes(role(size, tensor, 1, data + more)) <= trained_bytes(
        role(size, tensor, 1, data)
    )


def opt_175b(*measures: Measure, **cluster: float) -> MemoryPlan:
    """OPT-175B on 64 x 80 GB."""
    return plan_memory(
        job("175b", 8, 8, 1, generate=8), cluster_config(nodes=8, **cluster), frozenset(measures)
    )


def first_generation(plan: MemoryPlan) -> RankMemory:
    return plan.ranks[0]


def test_opt_175b_cannot_generate_beside_its_optimizer() -> None:
    assert "phase generation needs" in (refusal(opt_175b()) or "")
    assert "phase generation needs" in (refusal(opt_175b(Measure.REUSE_GRADIENTS)) or "")
    assert refusal(opt_175b(Measure.REUSE_GRADIENTS, Measure.OFFLOAD_OPTIMIZER)) is None


def test_lent_gradients_are_counted_where_they_are_used() -> None:
    plan = opt_175b(Measure.REUSE_GRADIENTS, Measure.OFFLOAD_OPTIMIZER)
    generation = plan.ranks[0].phase(Phase.GENERATION)
    assert generation.bytes_of(Pool.GRADIENTS, role=Role.ACTOR) == 0
    assert generation.bytes_of(Pool.GRADIENTS, role=Role.ACTOR, residence=Residence.LENT) > 11 * GB


def test_lent_gradients_that_nobody_needs_stay_where_they_are() -> None:
    work = Workload(prompts=8, prompt_tokens=8, response_tokens=8)
    small = job("1.3b", 1, 1, 8, generate=1, workload=work)
    plan = plan_memory(small, cluster_of(small), frozenset({Measure.REUSE_GRADIENTS}))
    generation = plan.ranks[0].phase(Phase.GENERATION)
    lent = generation.bytes_of(Pool.GRADIENTS, role=Role.ACTOR, residence=Residence.LENT)
    assert lent == generation.bytes_of(Pool.KV_CACHE)
    assert generation.bytes_of(Pool.GRADIENTS, role=Role.ACTOR) > 0


def test_offloaded_state_is_counted_on_the_host_of_its_node() -> None:
    plan = opt_175b(Measure.REUSE_GRADIENTS, Measure.OFFLOAD_OPTIMIZER)
    generation = plan.ranks[0].phase(Phase.GENERATION)
    each = generation.bytes_of(Pool.MASTERS, role=Role.ACTOR, residence=Residence.HOST)
    each += generation.bytes_of(Pool.MOMENTS, role=Role.ACTOR, residence=Residence.HOST)
    assert plan.host_bytes == 8 * each
    tight = opt_175b(
        Measure.REUSE_GRADIENTS, Measure.OFFLOAD_OPTIMIZER, host_memory_gb=each / GB * 7
    )
    assert "GB of host memory on a node" in (refusal(tight) or "")


def test_scorers_are_on_the_gpu_only_while_they_score() -> None:
    plan = opt_175b(Measure.OFFLOAD_SCORERS)
    on_gpu = {
        phase.phase: phase.bytes_of(Pool.WEIGHTS, role=Role.REFERENCE)
        for phase in plan.ranks[0].phases
    }
    assert on_gpu[Phase.SCORING] > 0
    assert on_gpu[Phase.GENERATION] == on_gpu[Phase.PPO_TRAINING] == on_gpu[Phase.SFT] == 0


def test_waves_follow_from_what_fits_at_once() -> None:
    plan = opt_175b(Measure.REUSE_GRADIENTS, Measure.OFFLOAD_OPTIMIZER)
    cache = plan.cache
    assert cache.sequences == 128
    assert cache.blocks_per_sequence == 16
    assert cache.concurrent == cache.num_blocks // 16
    assert cache.waves == math.ceil(128 / cache.concurrent) > 1


def test_a_limit_on_sequences_bounds_the_cache() -> None:
    limited = replace(job("1.3b", 1, 1, 8, generate=1), max_sequences=32)
    plan = plan_memory(limited, cluster_of(limited))
    assert plan.cache.concurrent == 32
    assert plan.cache.waves == 4
    assert plan.cache.num_blocks == 32 * plan.cache.blocks_per_sequence


def test_a_refusal_is_one_line_with_both_numbers_and_the_largest_pools() -> None:
    text = refusal(opt_175b())
    assert text is not None and "\n" not in text
    # 80 less 768 MiB, 33 x 8.125 MiB, 1768 MiB of NCCL (see test_communicators), 4 MiB, and 3 %.
    usable = 80 - (768 + 33 * 8.125 + 1768 + 4) * 2**20 / GB - 2.4
    for part in (
        "ranks 0-7",
        f"{usable:.1f} GB are usable",
        "actor foreign blocks 38.1",
        "of 80.0 GB reserved: context 0.8, workspaces 0.3, communicators 1.9",
        "margin 2.4",
    ):
        assert part in text


def test_actor_and_critic_may_be_cut_differently() -> None:
    base = job("13b", 4, 2, 1, generate=4)
    critic = replace(base.critic, layout=ParallelLayout(tensor=1, pipeline=4, data=2))
    plan = plan_memory(replace(base, critic=critic), cluster_of(base))
    kinds = {
        (memory.actor_stage, memory.critic_stage): tuple(memory.ranks) for memory in plan.ranks
    }
    assert kinds == {(0, 0): (0, 1), (0, 1): (2, 3), (1, 2): (4, 5), (1, 3): (6, 7)}


def test_a_job_of_another_size_than_the_cluster_is_refused() -> None:
    with pytest.raises(LayoutError, match="8 nodes x 8 GPUs = 64"):
        plan_memory(job("13b", 4, 2, 1, generate=4), cluster_config(nodes=8))


@settings(deadline=None)
@given(st.sets(st.integers(0, 40)))
def test_rank_ranges_name_every_rank_once(ranks: set[int]) -> None:
    text = rank_ranges(sorted(ranks))
    named = [
        rank
        for part in text.split(", ")
        if part
        for rank in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)
    ]
    assume(True)
    assert named == sorted(ranks)


def test_a_cache_of_a_given_size_is_planned_as_it_is() -> None:
    base = job("1.3b", 1, 1, 8, generate=1)
    free = plan_memory(base, cluster_of(base))
    block = free.cache.block_bytes
    for blocks in (3, free.cache.needed_blocks + 5):
        fixed = replace(base, cache_bytes=blocks * block + block - 1)
        plan = plan_memory(fixed, cluster_of(base))
        assert plan.cache.num_blocks == blocks
        generation = plan.ranks[0].phase(Phase.GENERATION)
        assert generation.bytes_of(Pool.KV_CACHE) == blocks * block


@settings(deadline=None, max_examples=40)
@given(jobs(), measure_sets)
def test_the_ranks_that_a_search_looks_at_are_the_fullest(
    job: Job, measures: frozenset[Measure]
) -> None:
    cluster = cluster_of(job)
    whole, part = (plan(job, cluster, measures) for plan in (plan_memory, plan_fullest))
    assert part.peak_bytes == whole.peak_bytes
    assert part.cache == whole.cache
    assert part.host_bytes == whole.host_bytes
    assert refusal(part) == refusal(whole)


@pytest.mark.parametrize("value_bytes", [2, 4])
def test_nccl_stages_no_gradients_and_gloo_what_others_send(value_bytes: int) -> None:
    """OPT-1.3B: 256 MiB, and half of the largest buffer: 64 MiB and the word embedding."""
    alone, shared = (
        job("1.3b", 1, 1, data, generate=1, value_bytes=value_bytes) for data in (1, 2)
    )
    words = 4 * 50304 * 2048  # 50272, up to a multiple of 128
    for allocator, staged in (
        (Allocator.CACHING, 0),
        (Allocator.EXACT, 2**28 + (2**26 + words) // 2),
    ):
        needs = [
            plan_memory(one, cluster_of(one).model_copy(update={"allocator": allocator}))
            .ranks[0]
            .phase(Phase.SFT)
            .bytes_of(Pool.WORKSPACE)
            for one in (alone, shared)
        ]
        assert needs[1] - needs[0] == staged


def test_recorded_steps_stay_from_the_first_generation_on() -> None:
    plan = opt_175b()
    on_gpu = {phase.phase: phase.bytes_of(Pool.GRAPHS) for phase in plan.ranks[0].phases}
    assert on_gpu[Phase.SFT] == on_gpu[Phase.REWARD_TRAINING] == 0
    assert on_gpu[Phase.GENERATION] == on_gpu[Phase.SCORING] == on_gpu[Phase.PPO_TRAINING] > 0
    eager = replace(job("175b", 8, 8, 1, generate=8), graphs=False)
    without = plan_memory(eager, cluster_config(nodes=8))
    assert all(not phase.bytes_of(Pool.GRAPHS) for phase in without.ranks[0].phases)


def test_only_a_caching_allocator_rounds() -> None:
    exact, caching = (
        plan_memory(
            job("1.3b", 1, 2, 2, generate=1), cluster_config(gpus_per_node=4, allocator=allocator)
        )
        for allocator in (Allocator.EXACT, Allocator.CACHING)
    )
    for memory in exact.ranks:
        assert all(not phase.bytes_of(Pool.ROUNDING) for phase in memory.phases)
    for memory in caching.ranks:
        for phase in memory.phases:
            living = phase.total() - phase.bytes_of(Pool.ROUNDING)
            assert 0 < phase.bytes_of(Pool.ROUNDING) < 0.15 * living


def test_a_plan_never_fills_the_margin() -> None:
    """The cache takes what is left; what is left is less by all that is reserved."""
    plan = opt_175b(Measure.REUSE_GRADIENTS, Measure.OFFLOAD_OPTIMIZER)
    fullest = plan.fullest.peak.total()
    assert fullest + plan.reserved.num_bytes <= 80 * GB
    assert plan.reserved.bytes_of(ReservedFor.MARGIN) == int(0.03 * 80 * GB)
    assert plan.budget_bytes - fullest < plan.cache.block_bytes


def test_a_plan_of_some_phases_is_refused_for_those_alone() -> None:
    plan = opt_175b()
    assert "phase generation needs" in (refusal(plan) or "")
    assert refusal(plan.during([Phase.SFT, Phase.REWARD_TRAINING])) is None
    assert plan.during([Phase.GENERATION]).peak_bytes == plan.peak_bytes

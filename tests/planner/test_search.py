import re
import sys
from dataclasses import replace
from types import FrameType

import pytest

from megachat.errors import CapacityError, LayoutError
from megachat.model.config import OPT_MODELS, Recompute
from megachat.parallel.layout import ParallelLayout
from megachat.planner.hardware import cluster_config
from megachat.planner.job import Workload
from megachat.planner.memory import refusal
from megachat.planner.records import Measure
from megachat.planner.search import (
    Plan,
    PlanRequest,
    RoleOptions,
    SearchResult,
    check_fits,
    fits_somewhere,
    search,
)
from tests.planner.jobs import SIZES


def request(size: str, *, nodes: int = 1, critic: str = "350m", **cluster: float) -> PlanRequest:
    return PlanRequest(
        actor=OPT_MODELS[f"facebook/opt-{size}"],
        critic=OPT_MODELS[f"facebook/opt-{critic}"],
        cluster=cluster_config(nodes=nodes, **cluster),
    )


def at(plan: PlanRequest, *layout: int, generate: int | None = None) -> PlanRequest:
    """The same with fixed layouts."""
    tensor, pipeline, data = layout
    fixed = ParallelLayout(tensor=tensor, pipeline=pipeline, data=data)
    options = replace(plan.actor_options, layout=fixed)
    return replace(plan, actor_options=options, generation_tensor=generate)


def check(plan: Plan) -> None:
    """What holds for every plan that is offered."""
    assert plan.memory.fits and refusal(plan.memory) is None
    assert plan.memory.cache.concurrent >= 1
    assert plan.seconds.total > 0
    plan.job.check_cluster(plan.cluster)


@pytest.mark.parametrize(("size", "nodes"), [("13b", 1), ("66b", 8), ("175b", 8)])
def test_layouts_for_the_large_models_are_found(size: str, nodes: int) -> None:
    """1024 x (256 + 256) tokens a step on 80 GB GPUs."""
    result = search(request(size, nodes=nodes))
    assert result.plans
    for plan in result.plans:
        check(plan)
    totals = [plan.seconds.total for plan in result.plans]
    assert totals == sorted(totals)
    assert result.best is result.plans[0]


def test_opt_175b_needs_offload_gradient_reuse_and_waves() -> None:
    result = search(request("175b", nodes=8))
    for plan in result.plans:
        assert {Measure.REUSE_GRADIENTS, Measure.OFFLOAD_OPTIMIZER} <= plan.memory.measures
        assert plan.memory.cache.waves > 1
        assert plan.job.generation_tensor == 8
    layouts = [str(plan.job.actor.layout) for plan in result.plans]
    assert "tp8.pp8.dp1" in layouts


def test_every_pair_of_layouts_is_either_planned_or_refused_once() -> None:
    result = search(request("13b"))
    planned = [(plan.job.actor.layout, plan.job.generation_tensor) for plan in result.plans]
    refused = [(item.train, item.generation_tensor) for item in result.refusals]
    assert len(set(planned + refused)) == len(planned + refused)
    trained = {layout for layout, _ in planned + refused}
    assert trained == {
        ParallelLayout(tensor=tensor, pipeline=pipeline, data=8 // tensor // pipeline)
        for tensor in (1, 2, 4, 8)
        for pipeline in (1, 2, 4, 8)
        if tensor * pipeline <= 8
    }


def test_refusals_give_reasons_with_numbers_the_nearest_first() -> None:
    result = search(request("175b", nodes=8))
    assert len(result.refusals) > 10
    assert all("GB are usable" in item.reason for item in result.refusals)
    numbers = [re.findall(r"([0-9.]+) GB (?:on|are)", item.reason) for item in result.refusals]
    excess = [float(needed) - float(usable) for needed, usable in numbers]
    assert excess == pytest.approx(sorted(excess), abs=0.11)


def test_a_small_model_needs_nothing_special() -> None:
    best = search(request("125m")).best
    assert best.memory.measures == frozenset()
    assert best.job.actor.recompute is Recompute.NONE
    assert best.memory.cache.waves == 1


def test_fixed_layouts_are_kept() -> None:
    plan = check_fits(at(request("175b", nodes=8), 8, 8, 1, generate=8))
    assert plan.job.actor.layout == ParallelLayout(tensor=8, pipeline=8, data=1)
    assert plan.job.generation_tensor == 8
    check(plan)


def test_a_run_that_cannot_fit_is_refused_in_one_line_with_the_numbers() -> None:
    with pytest.raises(CapacityError) as caught:
        check_fits(at(request("175b", nodes=8, gpu_memory_gb=40.0), 8, 8, 1, generate=8))
    message = str(caught.value)
    assert "\n" not in message
    usable = 40 - (768 + 33 * 8.125 + 1768 + 4) * 2**20 / 1e9 - 1.2  # as of test_memory
    assert "tp8.pp8.dp1" in message and f"{usable:.1f} GB are usable" in message


def test_recomputation_is_chosen_only_where_nothing_else_fits() -> None:
    wide = replace(
        request("13b", gpu_memory_gb=80.0),
        workload=Workload(prompt_tokens=1024, response_tokens=1024, sft_tokens=2048),
        actor_options=RoleOptions(
            layout=ParallelLayout(tensor=8), sequence_parallel=False, micro_batch_rows=16
        ),
        critic_options=RoleOptions(micro_batch_rows=1),
    )
    assert check_fits(wide).job.actor.recompute is Recompute.FULL
    narrow = replace(wide, actor_options=replace(wide.actor_options, micro_batch_rows=1))
    assert check_fits(narrow).job.actor.recompute is Recompute.NONE


def test_fewer_rows_at_once_come_before_recomputation() -> None:
    wide = replace(
        request("13b", gpu_memory_gb=80.0),
        workload=Workload(prompt_tokens=1024, response_tokens=1024, sft_tokens=2048),
        actor_options=RoleOptions(layout=ParallelLayout(tensor=8), sequence_parallel=False),
    )
    offered = check_fits(replace(wide, row_choices=(16, 1)))
    assert offered.job.actor.micro_batch_rows == offered.job.critic.micro_batch_rows == 1
    assert offered.job.actor.recompute is Recompute.NONE
    roomy = check_fits(replace(request("125m"), row_choices=(4, 1)))
    assert roomy.job.actor.micro_batch_rows == 4


@pytest.mark.parametrize(("size", "gpus"), [("13b", 1), ("13b", 2), ("13b", 4), ("66b", 8)])
def test_a_quick_look_says_what_the_search_says(size: str, gpus: int) -> None:
    asked = replace(request(size, gpus_per_node=gpus), row_choices=(4, 1))
    assert fits_somewhere(asked) == bool(search(asked).plans)


def test_recomputation_that_is_asked_for_is_kept() -> None:
    asked = RoleOptions(recompute=Recompute.FULL)
    plan = search(replace(request("125m"), actor_options=asked)).best
    assert plan.job.actor.recompute is Recompute.FULL


def test_a_large_critic_is_cut() -> None:
    small, large = (search(request("13b", critic=size)).best for size in ("350m", "13b"))
    assert small.job.critic.layout == ParallelLayout(data=8)
    assert large.job.critic.layout.tensor == 8


def test_of_equal_times_the_plan_with_fewest_measures_wins() -> None:
    best = search(request("1.3b")).best
    assert best.memory.measures == frozenset()


def test_a_layout_that_cannot_exist_is_an_error_and_not_a_refusal() -> None:
    with pytest.raises(LayoutError, match="layers 96 are not a multiple of pipeline degree 64"):
        search(at(request("175b", nodes=8), 1, 64, 1))
    with pytest.raises(LayoutError, match="generation tensor degree 3"):
        search(at(request("175b", nodes=8), 8, 8, 1, generate=3))
    with pytest.raises(LayoutError, match="= 64"):
        search(at(request("175b", nodes=8), 8, 4, 1))


def test_no_layout_at_all_says_so() -> None:
    with pytest.raises(CapacityError, match="change its size"):
        SearchResult(plans=(), refusals=()).best  # noqa: B018


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_planned_on_64_gpus(size: str) -> None:
    plan = check_fits(at(request(size, nodes=8), 4, 4, 4) if size != "175b" else at(
        request(size, nodes=8), 8, 8, 1
    ))  # fmt: skip
    check(plan)


def _calls_for_each_pair(plan: PlanRequest) -> float:
    """Python functions that a search calls, by pair of layouts."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        result = search(plan)
    finally:
        sys.setprofile(before)
    return calls / (len(result.plans) + len(result.refusals))


def test_a_pair_of_layouts_costs_as_much_on_a_thousand_nodes_as_on_eight() -> None:
    """Nothing is done once a GPU: a search is over in seconds up to `MOST_GPUS`."""
    small, large = (_calls_for_each_pair(request("13b", nodes=nodes)) for nodes in (8, 1000))
    assert large < 2 * small


def test_a_cluster_that_would_take_too_long_to_search_is_refused_unless_its_layout_is_fixed() -> (
    None
):
    too_many = request("13b", nodes=1000, gpus_per_node=64)
    with pytest.raises(CapacityError, match=r"= 64000: layouts are searched on up to 16000 GPUs"):
        search(too_many)
    assert search(at(too_many, 8, 1, 8000, generate=8)).best.job.actor.layout.data == 8000

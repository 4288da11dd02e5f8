import io
import json

import pytest
from rich.console import Console

from megachat.planner import report
from megachat.planner.records import Measure, Phase
from megachat.planner.search import Plan, SearchResult, search
from tests.planner.test_search import at, request


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return search(request("175b", nodes=8))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return search(at(request("175b", nodes=8), 8, 8, 1, generate=8)).best


def text_of(view: object) -> str:
    file = io.StringIO()
    Console(width=160, file=file).print(view)
    return file.getvalue()


def test_json_holds_every_pool_of_every_rank_in_every_phase(plan: Plan) -> None:
    content = json.loads(json.dumps(report.plan_json(plan)))
    assert content["generation"]["tensor"] == 8
    ranks = content["memory"]["ranks"]
    assert sorted(rank for kind in ranks for rank in kind["ranks"]) == list(range(64))
    for kind in ranks:
        assert set(kind["phases"]) == {phase.value for phase in Phase}
        for phase in kind["phases"].values():
            on_device = [p["bytes"] for p in phase["pools"] if p["residence"] == "device"]
            assert sum(on_device) == phase["device_bytes"] <= content["memory"]["budget_bytes"]
    assert content["kv_cache"]["waves"] == plan.memory.cache.waves
    assert content["predicted_seconds"]["total"] == pytest.approx(plan.seconds.total)
    assert len(content["reshard"]) == 8
    assert {"reuse_gradients", "offload_optimizer"} <= set(content["measures"])
    reserved = {part["what"]: part["bytes"] for part in content["memory"]["reserved"]}
    assert set(reserved) == {"context", "workspaces", "communicators", "peer_sums", "margin"}
    budget = content["memory"]["gpu_bytes"] - sum(reserved.values())
    assert content["memory"]["budget_bytes"] == budget


def test_the_ranking_is_cut_but_counted(result: SearchResult) -> None:
    content = report.search_json(result, limit=1)
    assert len(content["plans"]) == 1
    assert content["num_plans"] == len(result.plans)
    assert len(content["refusals"]) == len(result.refusals)


def test_the_view_says_what_is_offloaded_and_that_times_are_predicted(plan: Plan) -> None:
    text = text_of(report.plan_view(plan, title="a title"))
    for part in (
        "a title",
        "22.6 on host",
        "Predicted beside tensors, GB of 80.0: context 0.8, workspaces 0.3, communicators 1.9",
        "margin 2.4 (left free, 3%)",
        "11.3 lent",
        f"{plan.memory.cache.waves} waves",
        "not measured",
        report.MEASURE_TEXTS[Measure.OFFLOAD_OPTIMIZER],
    ):
        assert part in text


def test_the_view_shows_the_rank_that_is_asked_for(plan: Plan) -> None:
    assert "GB on ranks 56-63" in text_of(report.plan_view(plan, title="", rank=60))


def test_the_ranking_view_lists_plans_and_refusals(result: SearchResult) -> None:
    text = text_of(report.search_view(result, limit=2))
    assert str(result.plans[1].job.actor.layout) in text
    assert f"refused {result.refusals[0].train}" in text


def test_markdown_tables_are_well_formed(plan: Plan, result: SearchResult) -> None:
    text = report.markdown_section(plan, result, title="OPT-175B", limit=3)
    assert text.startswith("## OPT-175B\n")
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {7, len(report.RANKING_HEADERS) + 1}
    assert "—" not in text


def test_totals_of_the_table_are_those_of_the_phases(plan: Plan) -> None:
    fullest = plan.memory.fullest
    rows = report.memory_rows(fullest, budget_bytes=plan.memory.budget_bytes)
    assert rows[-2][1:] == [f"{phase.total() / 1e9:.1f}" for phase in fullest.phases]

"""Whole runs of the planner's own layouts, over models of torch's allocator and of the driver.

Rehearsals run in processes of their own: each joins a world that does not exist.
"""

import multiprocessing as mp
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from unittest.mock import patch

import pytest

from megachat.cli.plan import architecture
from megachat.errors import CapacityError
from megachat.planner.hardware import GB, cluster_config
from megachat.planner.records import Phase
from megachat.planner.search import Plan, PlanRequest, search
from tools.allocator_model import CachingAllocatorModel
from tools.dry_run import OUTSIDE_GB, rehearse_phases
from tools.rehearsal import PhaseUse

CASES = (("facebook/opt-13b", 1), ("facebook/opt-66b", 8), ("facebook/opt-175b", 8))
"""(model, nodes of 8 GPUs of 80 GB)."""
CAPACITY = int((80 - OUTSIDE_GB) * GB)
FRAGMENTS = 2 * GB
"""What living tensors may keep of the allocator's segments beside themselves while generating: the
most that was seen is 1.6 GB."""

Outcome = tuple[list[tuple[PhaseUse, int]], str]
"""Each phase that ended with its planned bytes, and what a `CapacityError` said, if one came."""


def plan_of(model: str, nodes: int) -> Plan:
    return search(
        PlanRequest(
            actor=architecture(model),
            critic=architecture("facebook/opt-350m"),
            cluster=cluster_config(nodes=nodes),
        )
    ).best


def rehearsal(model: str, nodes: int) -> Outcome:
    plan, seen = plan_of(model, nodes), []
    try:
        for found in rehearse_phases(plan, rank=plan.memory.fullest.ranks[0]):
            seen.append(found)
    except CapacityError as error:
        return seen, str(error)
    return seen, ""


def rehearsal_without_release(model: str, nodes: int) -> Outcome:
    """What was before: whoever wants memory from the driver gets what torch does not keep.

    torch's own way out, to give cached segments back where it wants a new one, is left to it.
    """
    with patch.object(CachingAllocatorModel, "release_cached"):
        return rehearsal(model, nodes)


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[tuple[str, int] | str, Future[Outcome]]]:
    """All rehearsals, under way."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.preload"])
    with ProcessPoolExecutor(max_workers=2, mp_context=context) as pool:
        futures: dict[tuple[str, int] | str, Future[Outcome]] = {
            case: pool.submit(rehearsal, *case) for case in CASES
        }
        futures["no release"] = pool.submit(rehearsal_without_release, *CASES[1])
        yield futures


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_planners_own_layout_runs_through_all_phases(
    outcomes: dict[tuple[str, int] | str, Future[Outcome]], case: tuple[str, int]
) -> None:
    seen, error = outcomes[case].result(timeout=900)
    step = [Phase.GENERATION, Phase.SCORING, Phase.PPO_TRAINING]
    assert not error
    assert [use.phase for use, _ in seen] == [Phase.SFT, Phase.REWARD_TRAINING, *step, *step]
    for use, planned in seen:
        assert use.peak_bytes <= CAPACITY
        # What lives between phases, and so what a stage left behind, is in the plan.
        assert use.living_bytes + use.mapped_bytes <= planned + FRAGMENTS // 4, use
        if use.phase is Phase.GENERATION:
            assert use.reserved_bytes - use.living_bytes <= FRAGMENTS
            assert use.peak_bytes <= planned + FRAGMENTS
            assert sum(use.calls.values()) < 5000


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_allocator_keeps_of_training_would_not_leave_room_to_generate(
    outcomes: dict[tuple[str, int] | str, Future[Outcome]], case: tuple[str, int]
) -> None:
    """So the phase change depends on what it hands back, in each of these jobs."""
    seen, _ = outcomes[case].result(timeout=900)
    uses = {(use.phase, use.iteration): use for use, _ in seen}
    kept = uses[Phase.PPO_TRAINING, 1].reserved_bytes
    assert kept + uses[Phase.GENERATION, 2].mapped_bytes > CAPACITY


def test_without_the_release_the_first_generation_has_no_memory(
    outcomes: dict[tuple[str, int] | str, Future[Outcome]],
) -> None:
    seen, error = outcomes["no release"].result(timeout=900)
    assert [use.phase for use, _ in seen] == [Phase.SFT, Phase.REWARD_TRAINING]
    for part in ("out of memory", "are wanted", "torch's tensors take", "of 78.00 GB", "its cache"):
        assert part in error, error

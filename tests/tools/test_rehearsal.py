"""Whole runs of the planner's own layouts, over models of torch's allocator and of the driver.

Each runs as far as the second generation of PPO, the first that follows an update. OPT-13B goes
through the stages before; OPT-175B, three times as dear, begins with PPO. What OPT-66B does, and
the two others in whole iterations, is in `docs/decisions/0012-device-memory.md`.

Rehearsals run in processes of their own: each joins a world that does not exist.
"""

import multiprocessing as mp
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from unittest.mock import patch

import pytest

from megachat.cli.plan import architecture
from megachat.errors import CapacityError
from megachat.planner.hardware import GB, cluster_config
from megachat.planner.records import Phase
from megachat.planner.search import Plan, PlanRequest, search
from tools.allocator_model import CachingAllocatorModel
from tools.dry_run import rehearse_phases, rehearsed_capacity
from tools.rehearsal import PhaseUse

Case = tuple[str, int]
OPT_13B, OPT_175B = ("facebook/opt-13b", 1), ("facebook/opt-175b", 8)
CASES = (OPT_13B, OPT_175B)
"""(model, nodes of 8 GPUs of 80 GB). Both fill their budget with the cache, to the last block."""
STEP = [Phase.GENERATION, Phase.SCORING, Phase.PPO_TRAINING]
PHASES = {
    OPT_13B: [Phase.SFT, Phase.REWARD_TRAINING, *STEP, Phase.GENERATION],
    OPT_175B: [*STEP, Phase.GENERATION],
}
"""What is run."""

Outcome = tuple[list[tuple[PhaseUse, int]], str]
"""Each phase that ended with its planned bytes, and what a `CapacityError` said, if one came."""


def plan_of(model: str, nodes: int) -> Plan:
    return search(
        PlanRequest(
            actor=architecture(model),
            critic=architecture("facebook/opt-125m"),  # the smallest: a third of the time
            cluster=cluster_config(nodes=nodes),
        )
    ).best


def fullest_rank(plan: Plan) -> int:
    return plan.memory.fullest.ranks[0]


def capacity(case: Case) -> int:
    plan = plan_of(*case)
    return rehearsed_capacity(plan, rank=fullest_rank(plan))


def rehearsal(case: Case) -> Outcome:
    plan, phases, seen = plan_of(*case), PHASES[case], []
    found = rehearse_phases(plan, rank=fullest_rank(plan), first=phases[0])
    try:
        seen.extend(islice(found, len(phases)))
    except CapacityError as error:
        return seen, str(error)
    return seen, ""


def rehearsal_without_release(case: Case) -> Outcome:
    """What was before: whoever wants memory from the driver gets what torch does not keep.

    torch's own way out, to give cached segments back where it wants a new one, is left to it.
    """
    with patch.object(CachingAllocatorModel, "release_cached"):
        return rehearsal(case)


def in_a_process(function: Callable[[Case], Outcome], case: Case) -> Outcome:
    """Each test has a rehearsal of its own, so that two of them can run at once."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.preload"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, case).result(timeout=900)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_planners_own_layout_runs_through_all_phases_thanks_to_the_release(case: Case) -> None:
    seen, error = in_a_process(rehearsal, case)
    assert not error
    assert [use.phase for use, _ in seen] == PHASES[case]
    for use, planned in seen:
        assert use.peak_bytes <= capacity(case)
        # What lives between phases, and so what a stage left behind, is in the plan.
        assert use.living_bytes + use.mapped_bytes <= planned, use
        if use.phase is Phase.GENERATION:
            # So is what the living tensors keep of the allocator's segments.
            assert use.peak_bytes <= planned, use
            assert sum(use.calls.values()) < 5000
    # What the allocator keeps of training would not leave room to generate.
    uses = {(use.phase, use.iteration): use for use, _ in seen}
    kept = uses[Phase.PPO_TRAINING, 1].reserved_bytes
    assert kept + uses[Phase.GENERATION, 2].mapped_bytes > capacity(case)


def test_without_the_release_the_first_generation_has_no_memory() -> None:
    seen, error = in_a_process(rehearsal_without_release, OPT_13B)
    assert [use.phase for use, _ in seen] == [Phase.SFT, Phase.REWARD_TRAINING]
    whole = f"of {capacity(OPT_13B) / GB:.2f} GB"
    for part in ("out of memory", "are wanted", "torch's tensors take", whole, "its cache"):
        assert part in error, error

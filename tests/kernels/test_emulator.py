"""The emulator: what it computes, the orders it takes, the misuse and the races it reports."""

from pathlib import Path

import pytest
import torch

from tests.kernels.build import Variant
from tests.kernels.launch import (
    FORWARD,
    LAUNCH_FAILURE,
    ORDERS,
    RANDOM,
    REVERSE,
    Order,
    Outcome,
    run_here,
    run_isolated,
)

PROBE = Path(__file__).with_name("emulator_probe.cu")


def line_of(text: str) -> int:
    """Where the probe's source has this text, for the first time."""
    lines = PROBE.read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if text in line)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_shuffles_ballots_atomics_and_shared_memory_do_what_cuda_says(order: Order) -> None:
    out = torch.zeros(259)
    assert run_here(PROBE, "probe_use", [out], order) == Outcome(0, "")
    for thread in range(64):
        inside = thread % 8
        down = thread + 3 if inside + 3 < 8 else thread
        up = thread - 3 if inside >= 3 else thread
        assert out[thread] == down + 1000 * up
    assert (out[64:128] == 7).all()
    assert out[128:130].tolist() == [sum(range(64)), 63]
    assert out[130:194].isnan().all(), "shared memory starts as NaN"
    assert out[194:258].tolist() == [(thread + 1) % 64 for thread in range(64)]
    assert out[258:].view(torch.int32).item() == 2**16 - 1


def order_of(order: Order) -> list[int]:
    out = torch.full((120,), -1, dtype=torch.int32)
    assert run_here(PROBE, "probe_order", [torch.zeros(1, dtype=torch.int32), out], order).code == 0
    return out.tolist()


def test_threads_and_blocks_run_forward_backward_or_in_an_order_of_the_seed() -> None:
    assert order_of(FORWARD) == list(range(120))
    assert order_of(REVERSE) == list(range(119, -1, -1))
    first, second = order_of(RANDOM), order_of(Order(RANDOM.kind, RANDOM.seed + 1, "another"))
    assert sorted(first) == list(range(120))
    assert first == order_of(RANDOM) != second


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize(
    ("what", "message", "place"),
    [
        (1, "divergent __syncthreads", "if (thread < 32) {"),
        (2, "deadlock", "half a warp never comes"),
        (3, "a shuffle reads lane 20, which its mask leaves out", "leaves out"),
        (4, "without being in its mask", "calls without"),
        (5, "lanes of one mask call different collectives", "if (thread % 2 == 0)"),
        (6, "deadlock", "== 5) return;"),
    ],
)
def test_misuse_is_an_error_with_its_place_and_the_next_launch_works(
    what: int, message: str, place: str, order: Order
) -> None:
    outcome = run_here(PROBE, "probe_misuse", [what, torch.zeros(64)], order)
    assert outcome.code == LAUNCH_FAILURE
    assert message in outcome.error
    assert f"emulator_probe.cu:{line_of(place) + 1}" in outcome.error
    assert "misuse_kernel" in outcome.error
    assert run_here(PROBE, "probe_use", [torch.zeros(259)], order) == Outcome(0, "")


@pytest.mark.parametrize(
    ("threads", "grid_y", "shared_bytes"), [(1025, 1, 0), (0, 1, 0), (32, 65536, 0), (32, 1, 49153)]
)
def test_a_launch_that_no_gpu_accepts_is_refused(
    threads: int, grid_y: int, shared_bytes: int
) -> None:
    outcome = run_here(
        PROBE, "probe_configuration", [threads, grid_y, shared_bytes, torch.zeros(259)], FORWARD
    )
    assert "impossible launch" in outcome.error
    assert outcome.code == 9


@pytest.mark.parametrize(
    ("barrier", "same_place", "racy"), [(1, 0, False), (0, 0, True), (1, 1, True)]
)
def test_tsan_sees_races_between_lanes_and_between_blocks_and_no_others(
    barrier: int, same_place: int, racy: bool, tmp_path: Path
) -> None:
    outcome = run_isolated(
        PROBE,
        "probe_race",
        [barrier, same_place, 32, torch.zeros(64)],
        FORWARD,
        variant=Variant.TSAN,
        folder=tmp_path,
    )
    assert outcome.code == 0, outcome.report
    assert ("data race" in outcome.complaint) == racy, outcome.report


@pytest.mark.parametrize(("shared_floats", "overflows"), [(32, False), (31, True)])
def test_asan_sees_an_access_behind_shared_memory(
    shared_floats: int, overflows: bool, tmp_path: Path
) -> None:
    outcome = run_isolated(
        PROBE,
        "probe_race",
        [1, 0, shared_floats, torch.zeros(64)],
        FORWARD,
        variant=Variant.ASAN,
        folder=tmp_path,
    )
    assert ("heap-buffer-overflow" in outcome.complaint) == overflows, outcome.report
    assert overflows or outcome.complaint == ""

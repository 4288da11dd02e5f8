from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from megachat.errors import CheckpointError, LaunchError, MegachatError
from megachat.parallel.handover import Board, on_first_rank, store_barrier
from tests.harness import RankError, run_ranks


def _work_on_first() -> list[Any]:
    calls: list[int] = []

    def work() -> dict[str, int]:
        calls.append(dist.get_rank())
        return {"made by": dist.get_rank()}

    results = [on_first_rank(work, task="testing") for _ in range(3)]
    store_barrier("testing")
    return [calls, results]


def test_one_rank_works_and_all_get_the_result() -> None:
    found = run_ranks(3, _work_on_first)
    assert [calls for calls, _ in found] == [[0, 0, 0], [], []]
    assert all(results == [{"made by": 0}] * 3 for _, results in found)


def _fail_on_first() -> list[str]:
    def refuse() -> None:
        raise CheckpointError("the disk says no")

    messages = []
    for _ in range(2):  # the ranks stay in step after a failure
        with pytest.raises(CheckpointError) as caught:
            on_first_rank(refuse, task="testing")
        messages.append(str(caught.value))
    return [*messages, on_first_rank(lambda: "fine", task="testing")]


def test_a_failure_is_raised_on_every_rank_and_the_next_work_is_not_affected() -> None:
    expected = ["the disk says no", "the disk says no", "fine"]
    assert run_ranks(3, _fail_on_first) == [expected] * 3


def _crash_on_first() -> str:
    def crash() -> None:
        raise ZeroDivisionError("a bug")

    try:
        on_first_rank(crash, task="counting")
    except Exception as error:
        return f"{type(error).__name__} {error}"
    return "nothing"


def test_a_bug_on_the_first_rank_ends_the_others_with_its_traceback() -> None:
    first, second = run_ranks(2, _crash_on_first)
    assert first == "ZeroDivisionError a bug"
    assert second.startswith("RuntimeError rank 0 failed, counting:\n")
    assert "ZeroDivisionError: a bug" in second and "in crash" in second


def _wait_for_nobody() -> str:
    board = Board("reading /models/x", limit=timedelta(seconds=0.05))
    try:
        board.wait(["never posted"])
    except LaunchError as error:
        return str(error)
    return ""


def test_a_message_that_never_comes_ends_the_wait_at_its_limit() -> None:
    [message] = run_ranks(1, _wait_for_nobody)
    assert message.startswith(
        "rank 0 has waited 0:00:00.050000 for another rank, reading /models/x"
    )
    assert "\n" not in message


def _parts_of_a_task(failing: int) -> tuple[str, str, int]:
    """(failure that this rank waits for, what ends the task, bytes counted)."""
    rank, board = dist.get_rank(), Board("testing")
    own = CheckpointError(f"part {rank} is broken") if rank == failing else None
    board.count_bytes(10 + rank)
    board.post(f"ready {rank}", own)
    waited = board.wait([f"ready {other}" for other in range(3)])
    looks: list[int] = []
    end = ""
    try:
        board.conclude(
            f"end {rank}",
            own,
            names=[f"end {other}" for other in range(3)],
            meanwhile=lambda: looks.append(1),
        )
    except MegachatError as error:
        end = str(error)
    assert (board.failure() is None) == (failing < 0)
    return str(waited or ""), end, board.count_bytes()


def test_all_ranks_agree_on_how_a_task_ended() -> None:
    broken = "part 1 is broken"
    assert run_ranks(3, _parts_of_a_task, 1) == [(broken, broken, 33)] * 3
    assert run_ranks(3, _parts_of_a_task, -1) == [("", "", 33)] * 3


def _leave_a_rank_out() -> None:
    if dist.get_rank() == 0:
        store_barrier("testing", limit=timedelta(seconds=0.1))


def test_a_barrier_does_not_open_before_everyone_is_there() -> None:
    with pytest.raises(RankError, match="LaunchError: rank 0 has waited"):
        run_ranks(2, _leave_a_rank_out)

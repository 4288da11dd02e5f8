import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import wait

import pytest

from megachat.errors import LayoutError
from megachat.parallel.failures import Failure, failure_of
from megachat.parallel.local_ranks import Channel, LocalRanks


@pytest.fixture
def ranks() -> Iterator[LocalRanks]:
    """None yet; those that a test starts are ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.preload"])
    ranks = LocalRanks(context, on_cuda=False)
    yield ranks
    ranks.end()
    assert ranks.all_done


def _first_failure(ranks: LocalRanks) -> Failure:
    while not ranks.all_done:
        wait(ranks.handles)
        for failure in ranks.collect():
            return failure
    raise AssertionError("nobody failed")


def _rank(channel: Channel, how: str) -> None:
    if how == "raise":
        channel.leave(failure_of(LayoutError("3 is not 4"), origin="rank 1"))
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(7)
    if how == "stay":
        signal.pause()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "3 is not 4"),
        ("kill", "rank 1 was killed by SIGKILL: see whether memory ran out"),
        ("exit", "rank 1 ended without a message: exit code 7"),
    ],
)
def test_a_rank_tells_or_shows_how_it_failed(ranks: LocalRanks, how: str, message: str) -> None:
    ranks.start("rank 0", _rank, "stay")
    ranks.start("rank 1", _rank, how)
    assert _first_failure(ranks).message == message


def test_ranks_that_end_well_are_no_failure(ranks: LocalRanks) -> None:
    for number in range(2):
        ranks.start(f"rank {number}", _rank, "end")
    with pytest.raises(AssertionError, match="nobody failed"):
        _first_failure(ranks)

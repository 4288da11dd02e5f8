import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from megachat.errors import LaunchError
from megachat.parallel.ending import signals_raise, watch_ranks
from megachat.parallel.failures import failure_of
from megachat.parallel.lifeline import Gathering, Member
from megachat.parallel.local_ranks import Channel, LocalRanks
from megachat.parallel.rendezvous import MeetingPoint, Role, meet
from tests.parallel.test_several_nodes import free_port


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_raised_once_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(LaunchError, match=f"ended by {number.name}, as it was told"):
        with signals_raise():
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), number)  # an impatient user does not break the end
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def _lose_a_peer(channel: Channel, pipe: str) -> None:
    """Says that a collective broke down, and only then lets the peer die of what broke it."""
    error = RuntimeError("[gloo] Connection closed by peer")
    failure = failure_of(error, origin="rank 0")
    os.close(os.open(pipe, os.O_WRONLY))
    channel.leave(failure)


def _be_killed(_: Channel, pipe: str) -> None:
    with open(pipe, "rb") as peer:
        peer.read()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_lost_its_peer_is_not_the_news_though_it_may_speak_first(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "pipe")
    port = free_port()
    gathering = Gathering(job="job", unit="node", count=1, where=f"127.0.0.1:{port}", seconds=30.0)
    point = MeetingPoint(host="127.0.0.1", port=port, role=Role.HOST, gathering=gathering)
    meeting = meet(point, Member(name="node", host="here", number=0))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.preload"])
    ranks = LocalRanks(context, on_cuda=False)
    try:
        ranks.start("rank 0", _lose_a_peer, str(tmp_path / "pipe"))
        ranks.start("rank 1", _be_killed, str(tmp_path / "pipe"))
        news = watch_ranks(ranks, meeting)
    finally:
        ranks.end()
        meeting.close()
    assert news.failure is not None
    assert news.failure.message == "rank 1 was killed by SIGKILL: see whether memory ran out"

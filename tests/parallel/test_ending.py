import multiprocessing
import os
import signal
from pathlib import Path

from megachat.parallel.ending import watch_ranks
from megachat.parallel.failures import Failure, failure_of
from megachat.parallel.lifeline import Gathering, Member
from megachat.parallel.local_ranks import Channel, LocalRanks
from megachat.parallel.rendezvous import MeetingPoint, Role, meet
from tests.harness.ports import free_port


def _lose_a_peer(channel: Channel) -> None:
    error = RuntimeError("[gloo] Connection closed by peer")
    channel.leave(failure_of(error, origin="rank 0"))


def _be_killed(_: Channel, pipe: str) -> None:
    """Dies when the other end of the pipe is closed."""
    with open(pipe, "rb") as peer:
        peer.read()
    os.kill(os.getpid(), signal.SIGKILL)


class _LateDeath(LocalRanks):
    """The killed rank dies after the launcher has heard the other one, as on a busy machine."""

    pipe: Path

    def collect(self) -> list[Failure]:
        heard = super().collect()
        if heard and self.pipe.exists():
            self.pipe.open("wb").close()
            self.pipe.unlink()
        return heard


def test_a_rank_that_lost_its_peer_is_not_the_news_though_it_speaks_first(tmp_path: Path) -> None:
    port = free_port()
    gathering = Gathering(job="job", unit="node", count=1, where=f"127.0.0.1:{port}", seconds=30.0)
    point = MeetingPoint(host="127.0.0.1", port=port, role=Role.HOST, gathering=gathering)
    meeting = meet(point, Member(name="node", host="here", number=0))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.preload"])
    ranks = _LateDeath(context, on_cuda=False)
    ranks.pipe = tmp_path / "pipe"
    os.mkfifo(ranks.pipe)
    try:
        ranks.start("rank 0", _lose_a_peer)
        ranks.start("rank 1", _be_killed, str(ranks.pipe))
        news = watch_ranks(ranks, meeting)
    finally:
        ranks.end()
        meeting.close()
    assert news.failure is not None
    assert news.failure.message == "rank 1 was killed by SIGKILL: see whether memory ran out"

import signal
import socket
import time
from collections.abc import Iterator

import pytest

from megachat.errors import LaunchError
from megachat.parallel.failures import death_of, failure_of, told_to_end
from megachat.parallel.lifeline import Gathering, Hub, Line, Member, News, call, listen

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"


@pytest.fixture
def hub() -> Iterator[tuple[Hub, int]]:
    """For three members on a free port."""
    listener = listen("127.0.0.1", 0)
    port = int(listener.getsockname()[1])
    where = f"127.0.0.1:{port}"
    gathering = Gathering(job="job", unit="node", count=3, where=where, seconds=60.0)
    hub = Hub(listener, gathering, store_port=5)
    yield hub, port
    hub.close()


def _join(port: int, number: int | None = None, *, job: str = "job") -> Line:
    member = Member(name="node", host=f"host{number}", number=number)
    return Line(call("127.0.0.1", port), job=job, member=member, where=f"127.0.0.1:{port}")


def _news(line: Line) -> News:
    while not isinstance(message := line.message(timeout=30.0), News):
        assert message is not None, "no news in time"
    return message


def test_members_are_numbered_and_all_of_them_learn_of_all(hub: tuple[Hub, int]) -> None:
    lines = [_join(hub[1], 0), _join(hub[1]), _join(hub[1])]
    assert [line.welcome().number for line in lines] == [0, 1, 2]
    for line in lines:
        line.done()
    assert [_news(line).failure for line in lines] == [None] * 3
    for line in lines:
        line.close()


def test_a_consequence_waits_for_its_cause(hub: tuple[Hub, int]) -> None:
    lines = [_join(hub[1], number) for number in range(3)]
    cause = death_of("rank 2", -signal.SIGKILL, on_cuda=False)
    lines[0].report(failure_of(RuntimeError(CLOSED), origin="rank 0"))
    lines[2].report(cause)
    for line in lines:
        assert line.welcome()
        assert _news(line).failure == cause
        line.close()


def test_a_consequence_alone_is_told_after_a_while(hub: tuple[Hub, int]) -> None:
    lines = [_join(hub[1], number) for number in range(2)]
    consequence = failure_of(RuntimeError(CLOSED), origin="rank 0")
    lines[0].report(consequence)
    for line in lines:
        assert line.welcome()
        assert _news(line).failure == consequence
        line.close()


def test_a_member_that_hangs_up_is_lost_and_one_that_is_done_is_not(hub: tuple[Hub, int]) -> None:
    lines = [_join(hub[1], number) for number in range(3)]
    for line in lines:
        line.welcome()
    lines[2].done()
    lines[2].close()
    lines[1].close()
    failure = _news(lines[0]).failure
    assert failure is not None
    assert failure.message.startswith("lost contact with node 1 on host1")
    lines[0].close()


def test_a_late_member_hears_of_the_failure_at_once(hub: tuple[Hub, int]) -> None:
    first = _join(hub[1], 0)
    first.welcome()
    first.report(told_to_end(signal.SIGINT))
    assert _news(first).failure is not None
    late = _join(hub[1], 1)
    late.welcome()
    failure = _news(late).failure
    assert failure is not None and failure.number == signal.SIGINT
    assert "as it was told, while it waited: 1 of 3 nodes have joined" in failure.message
    first.close()
    late.close()


def test_strangers_and_members_of_other_jobs_are_kept_out(hub: tuple[Hub, int]) -> None:
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"token": 1}\n'):
        with call("127.0.0.1", hub[1]) as stranger:
            stranger.sendall(words)
            stranger.settimeout(30.0)
            assert stranger.recv(100) == b""
    other = _join(hub[1], 1, job="another")
    with pytest.raises(LaunchError, match="another job answers at 127.0.0.1:.*another port"):
        other.welcome()
    first, twice = _join(hub[1], 1), _join(hub[1], 1)
    assert first.welcome().number == 1
    with pytest.raises(LaunchError, match="node 1 on host1 has joined at .* already"):
        twice.welcome()
    first.report(told_to_end(signal.SIGINT))
    for line in (first, twice, other):
        line.close()


def test_a_server_that_is_no_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        line = _join(stranger.getsockname()[1])
        accepted, _ = stranger.accept()
        with accepted:
            accepted.sendall(b"220 mail\r\n")
            with pytest.raises(LaunchError, match="is not this job: choose another port"):
                line.welcome()
    line.close()


def test_the_loss_of_the_hub_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = _join(server.getsockname()[1])
        server.accept()[0].close()
        started = time.monotonic()
        failure = _news(line).failure
    assert failure is not None and "lost contact with the first node at" in failure.message
    assert time.monotonic() - started < 5.0
    line.close()

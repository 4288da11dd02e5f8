import random
import signal
import socket
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megachat.errors import CapacityError, LaunchError, LayoutError
from megachat.parallel.failures import (
    Failure,
    Severity,
    death_of,
    failure_of,
    first_cause,
    lost_a_peer,
    told_to_end,
)
from megachat.parallel.lifeline import Gathering, Hub, Line, Member, News, call, listen

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"


def _raised(error: Exception, *, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_a_failure_travels_as_text_and_is_raised_as_what_it_was() -> None:
    failure = failure_of(_raised(LayoutError("3 is not 4")), origin="rank 1")
    error = Failure.from_json(failure.to_json()).error()
    assert type(error) is LayoutError and str(error) == "3 is not 4"
    assert failure.exit_code == 2


def test_an_unexpected_error_keeps_its_stack_and_its_rank() -> None:
    failure = failure_of(_raised(KeyError("x")), origin="rank 3 on gpu7")
    assert failure.message.startswith("rank 3 on gpu7 failed:\nTraceback")
    assert failure.exit_code == 1
    assert type(failure.error()) is LaunchError


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(CLOSED),
        dist.DistNetworkError("recv failed"),
        dist.DistBackendError("NCCL communicator was aborted on rank 0"),
        _raised(LaunchError("rank 0 cannot join the job"), cause=RuntimeError(CLOSED)),
    ],
)
def test_a_collective_that_broke_down_is_no_cause_even_as_an_error_of_ours(
    error: Exception,
) -> None:
    assert lost_a_peer(error)
    assert failure_of(error, origin="rank 0").severity is Severity.CONSEQUENCE


@pytest.mark.parametrize("error", [CapacityError("9 blocks"), RuntimeError("shape [3]"), OSError()])
def test_other_errors_are_causes(error: Exception) -> None:
    assert failure_of(error, origin="rank 0").severity is Severity.CAUSE


def test_a_death_is_named_by_its_signal_and_memory_only_where_the_system_kills() -> None:
    words = {
        number: death_of("rank 2", -number, on_cuda=True).message
        for number in (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV)
    }
    assert words[signal.SIGKILL] == "rank 2 was killed by SIGKILL: see whether memory ran out"
    assert "NCCL's watchdog" in words[signal.SIGABRT] and "memory" not in words[signal.SIGABRT]
    assert words[signal.SIGSEGV] == "rank 2 was killed by SIGSEGV"
    assert "NCCL" not in death_of("rank 2", -signal.SIGABRT, on_cuda=False).message
    assert death_of("rank 2", 7, on_cuda=True).message.endswith("exit code 7")


def test_the_cause_is_the_news_in_whatever_order_failures_arrive() -> None:
    cause = death_of("rank 1", -signal.SIGKILL, on_cuda=True)
    others = [
        death_of("rank 2", -signal.SIGABRT, on_cuda=True),
        failure_of(RuntimeError(CLOSED), origin="rank 0"),
    ]
    for seed in range(6):
        order = random.Random(seed).sample([cause, *others], k=3)
        assert first_cause(order) is cause
    assert first_cause(others[::-1]) is others[0]
    first, second = told_to_end(signal.SIGTERM), death_of("rank 0", 7, on_cuda=False)
    assert first_cause([first, second]) is first


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
    assert _news(late).failure == told_to_end(signal.SIGINT)
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

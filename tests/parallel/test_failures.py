import random
import signal

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
        RuntimeError("Connection closed by peer: a remote worker hanging or bugs"),
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

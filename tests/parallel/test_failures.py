import random
import signal
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist

from megachat.errors import CapacityError, InternalError, LaunchError, LayoutError, SignalError
from megachat.parallel.failures import (
    Failure,
    Severity,
    death_of,
    failure_of,
    first_cause,
    lost_a_peer,
    told_to_end,
)
from megachat.parallel.signals import Signalled

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
    assert error.exit_code == 2


def test_an_unexpected_error_is_one_line_that_names_its_rank_and_where_its_stack_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    error = failure_of(_raised(KeyError("x")), origin="rank 3 on gpu7").error()
    assert type(error) is InternalError and error.exit_code == 1
    (stack,) = tmp_path.iterdir()
    assert str(error).startswith("internal error on rank 3 on gpu7: KeyError: 'x' (")
    assert str(error).endswith(f"its stack is in {stack}")
    assert stack.read_text().startswith("Traceback")
    assert "raise error from cause" in stack.read_text()


def test_a_signal_travels_with_its_number() -> None:
    for raised in (Signalled(signal.SIGTERM), told_to_end(signal.SIGTERM).error()):
        failure = Failure.from_json(failure_of(raised, origin="the launcher").to_json())
        error = failure.error()
        assert type(error) is SignalError and error.exit_code == 128 + 15
        assert str(error) == "the job was ended by SIGTERM, as it was told"


def test_what_the_system_refuses_is_a_cause_whoever_meets_it() -> None:
    """Few handles end a rank inside gloo as well."""
    error = RuntimeError("[/pytorch/third_party/gloo/...] socket: Too many open files")
    failure = failure_of(error, origin="rank 0")
    assert failure.severity is Severity.CAUSE and failure.kind == "HostError"


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
    assert death_of("rank 2", -signal.SIGHUP, on_cuda=False) == told_to_end(signal.SIGHUP)


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

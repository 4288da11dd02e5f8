import errno
import logging
import os
import resource
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from megachat.errors import DataError, HostError, InternalError
from megachat.telemetry.crash import as_megachat_error, refusal_of
from megachat.telemetry.log import set_up_logging


def _raised(error: Exception, *, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x", "/out/model"), "/out/model: no space left on device: free"),
        (PermissionError(errno.EACCES, "x", "/data"), "/data: permission denied: give this user"),
        (OSError(errno.EIO, "x"), "input/output error"),
        (MemoryError(), "cannot allocate memory: use fewer processes"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "free some space"),
        (ImportError("libx.so: cannot open: Too many open files"), "ulimit -n"),
    ],
)
def test_what_the_system_refuses_is_told_with_what_to_do(error: Exception, words: str) -> None:
    told = as_megachat_error(error)
    assert type(told) is HostError and told.exit_code == 2
    assert words in str(told) and "\n" not in str(told)


def test_a_limit_is_told_with_its_number() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = as_megachat_error(OSError(errno.EMFILE, "x"))
    assert f"too many open files: this process may have {soft} at once" in str(told)


def test_memory_that_torch_cannot_get_is_a_refusal() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    told = refusal_of(caught.value)
    assert told is not None and "use fewer processes" in str(told)


def test_a_refusal_below_another_error_is_found() -> None:
    error = _raised(RuntimeError("cannot make the data set"), cause=OSError(errno.ENOSPC, "x"))
    assert type(as_megachat_error(error)) is HostError


@pytest.mark.parametrize("error", [FileNotFoundError(2, "x", "y"), ValueError("a\nb"), KeyError(1)])
def test_a_bug_is_one_line_and_its_stack_is_in_the_log_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = logging.getLogger().level
    set_up_logging(Path("logs"), rank=3)
    try:
        told = as_megachat_error(_raised(error), origin="rank 3")
    finally:
        set_up_logging(rank=1)
        logging.getLogger().setLevel(before)
    assert type(told) is InternalError and told.exit_code == 1
    assert "\n" not in str(told) and "test_crash.py:" in str(told)
    assert str(told).endswith("its stack is in logs/rank_003.log")
    assert "Traceback (most recent call last)" in (tmp_path / "logs/rank_003.log").read_text()


def test_a_stack_that_cannot_be_kept_is_no_second_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(tmp_path / "missing"))
    told = as_megachat_error(KeyError(1))
    assert str(told).endswith("its stack could not be kept (No such file or directory)")


def test_our_own_errors_stay_what_they_are() -> None:
    error = DataError("rows.jsonl: no rows")
    assert as_megachat_error(error) is error

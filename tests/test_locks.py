"""Locks between processes: what a waiting process says, and what one without locks says."""

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import socket
import threading
from multiprocessing.synchronize import Event
from pathlib import Path

import filelock
import pytest

from megachat import locks
from megachat.errors import DataError
from megachat.locks import HeldElsewhereError, Purpose, claimed, held

PURPOSE = Purpose(work="boil the kettle", remedy="drink water", error=DataError)


class Said(logging.Handler):
    """Keeps messages, and lets a test wait for a number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self._heard = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._heard:
            self.messages.append(record.getMessage())
            self._heard.notify_all()

    def wait_for(self, count: int) -> bool:
        with self._heard:
            return self._heard.wait_for(lambda: len(self.messages) >= count, timeout=60)


def test_who_waits_says_once_for_what_and_after_long_how_to_find_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LONG_SECONDS", 0.01)
    path, said, done = tmp_path / "lock", Said(), threading.Event()

    def wait() -> None:
        with held(path, PURPOSE):
            done.set()

    logger = logging.getLogger(locks.__name__)
    logger.addHandler(said)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with filelock.FileLock(path):
            second = threading.Thread(target=wait)
            second.start()
            assert said.wait_for(2)
            assert not done.is_set()
        second.join(60)
    finally:
        logger.removeHandler(said)
        logger.setLevel(level)
    assert done.is_set()
    first, late = said.messages
    assert first == f"waiting for another process to boil the kettle (it holds {path})"
    assert f"fuser -v {path}" in late and "has waited" in late


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_one_line(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DataError) as caught, held(tmp_path / "lock", PURPOSE):
        pass
    assert str(caught.value) == (
        f"{tmp_path}/lock: cannot be locked to boil the kettle: the file system has no file locks "
        f"({os.strerror(number)}): drink water"
    )


def test_a_platform_without_locks_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(DataError, match="no file locks"), held(tmp_path / "lock", PURPOSE):
        pass


def test_a_place_that_cannot_be_written_is_another_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="make the folder writable"):
        with held(tmp_path / "file" / "lock", PURPOSE):
            pass


def test_an_error_of_the_work_itself_passes_and_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the work"), held(tmp_path / "lock", PURPOSE):
        raise OSError(errno.ENOLCK, "of the work")
    with held(tmp_path / "lock", PURPOSE):
        pass


def _hold(path: Path, held_now: Event, done: Event) -> None:
    with claimed(path):
        held_now.set()
        done.wait(60)


def _start_holder(path: Path) -> multiprocessing.process.BaseProcess:
    """Another process that has claimed the file when this returns."""
    context = multiprocessing.get_context("fork")
    held_now = context.Event()
    holder = context.Process(target=_hold, args=(path, held_now, context.Event()))
    holder.start()
    assert held_now.wait(60)
    return holder


def test_who_comes_second_learns_host_and_process_of_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = _start_holder(path)
    try:
        for _ in range(2):  # to ask changes nothing
            with pytest.raises(HeldElsewhereError) as caught, claimed(path):
                pass
            found = caught.value.holder
            assert found is not None
            assert (found.host, found.pid) == (socket.gethostname(), holder.pid)
            assert str(holder.pid) in str(caught.value) and found.host in str(caught.value)
    finally:
        holder.kill()
        holder.join(60)


def test_the_claim_of_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = _start_holder(path)
    holder.kill()
    holder.join(60)
    assert str(holder.pid) in path.read_text()  # it could not clean up
    with claimed(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert path.read_text() == ""


def test_a_claim_ends_with_an_error_of_the_work(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(ValueError, match="of the work"), claimed(path):
        raise ValueError("of the work")
    with claimed(path), pytest.raises(HeldElsewhereError), claimed(path):
        pass


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pid": 1}'])
def test_a_holder_that_has_not_said_its_name_is_another_process(text: str, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with claimed(path):
        path.write_text(text)
        with pytest.raises(HeldElsewhereError, match="another process"), claimed(path):
            pass


def test_a_claim_without_locks_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError) as caught, claimed(tmp_path / "lock"):
        pass
    assert "no file locks" in str(locks.why_no_locks(caught.value))

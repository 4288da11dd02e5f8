"""Holds file locks between processes: waits for one (`held`), or names its holder (`claimed`).

A lock is the kernel's own (`flock`), which ends with the process that holds it. A lock that is a
mere file would outlive a killed process, and the process id in it means nothing to another
container; so nothing falls back to that.
"""

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import filelock

from megachat.errors import MegachatError

_LOG = logging.getLogger(__name__)

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""What `flock` answers on a file system that has no locks, or a server that grants none."""

LONG_SECONDS = 60.0
"""After so long a wait it is worth knowing how to find the holder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Purpose:
    """What a lock is for, as messages tell it."""

    work: str
    """What one process does while the others wait, e.g. `build the CPU kernels`."""
    remedy: str
    """How to do without locks on that file system."""
    error: type[MegachatError]
    """Raised where the lock cannot be had."""


@contextmanager
def held(path: Path, purpose: Purpose) -> Iterator[None]:
    """Holds the lock of a file for the length of the body, waiting for other processes if need be.

    Args:
        path: The lock file; it is made if missing and stays.
        purpose: For the messages.

    Raises:
        MegachatError: Of the purpose's kind: the file system has no locks, or the file cannot be
            made.
    """
    lock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        _acquire(lock, path, purpose)
    except (OSError, NotImplementedError) as error:
        raise purpose.error(_refusal(path, purpose, error)) from error
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who holds a claim, as it says itself in the file."""

    host: str
    pid: int
    since: str
    """Local time of that host."""

    @classmethod
    def myself(cls) -> Self:
        """This process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(host=socket.gethostname(), pid=os.getpid(), since=since)

    def __str__(self) -> str:
        """As messages call it."""
        return f"process {self.pid} on host {self.host}, since {self.since}"


class HeldElsewhereError(Exception):
    """A claim that another process has; `holder` is None where it has not said who it is."""

    def __init__(self, holder: Holder | None) -> None:
        """Keeps the holder."""
        super().__init__(str(holder or "another process"))
        self.holder = holder


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Holds the lock of a file for the length of the body, or says at once who has it.

    The file holds the holder's name for those who come in vain. It stays when the claim ends, since
    removing it would let two others lock two files of one name; it is empty then.

    Args:
        path: The lock file; it is made if missing.

    Raises:
        HeldElsewhereError: Another process has it.
        OSError: The file cannot be made or written, or the file system has no locks
            (`why_no_locks` tells).
    """
    # Not `filelock`: it empties the file before it knows whether it gets the lock.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HeldElsewhereError(_read_holder(path)) from None
        _sign(descriptor, json.dumps(asdict(Holder.myself()), allow_nan=False).encode())
        try:
            yield
        finally:
            with suppress(OSError):  # a name that stays means nothing without the lock
                _sign(descriptor, b"")
    finally:
        os.close(descriptor)  # and with it the lock


def _sign(descriptor: int, text: bytes) -> None:
    """Puts the text in the place of the file's content, on the disk, for other nodes to see."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)
    os.fsync(descriptor)


def _read_holder(path: Path) -> Holder | None:
    """Who holds a claim; None in the moment between its lock and its name."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def why_no_locks(error: BaseException) -> str | None:
    """Says that a file system has no locks, where an error means that; None where it does not.

    For the locks of libraries, which take them on their own.
    """
    if isinstance(error, NotImplementedError):
        number: int | None = errno.ENOSYS
    else:
        number = error.errno if isinstance(error, OSError) else None
    if number is None or number not in _NO_LOCKS:
        return None
    return f"the file system has no file locks ({os.strerror(number)})"


def _acquire(lock: filelock.BaseFileLock, path: Path, purpose: Purpose) -> None:
    """Takes the lock; each kind of waiting is told once."""
    try:
        lock.acquire(blocking=False)
        return
    except filelock.Timeout:
        level = logging.DEBUG if _sibling_holds(path) else logging.INFO
        _LOG.log(level, "waiting for another process to %s (it holds %s)", purpose.work, path)
    try:
        lock.acquire(timeout=LONG_SECONDS)
        return
    except filelock.Timeout:
        _LOG.warning(
            "%s has waited %.0f s for another process to %s: if none does, see who holds it: "
            "fuser -v %s",
            socket.gethostname(),
            LONG_SECONDS,
            purpose.work,
            path,
        )
    lock.acquire()


def _sibling_holds(path: Path) -> bool:
    """Whether a rank that this rank's launcher has started on this host, too, holds the lock.

    That ranks take turns is nothing to tell. Where it cannot be found out, the answer is no.
    """
    if multiprocessing.parent_process() is None:
        return False
    try:
        number = path.stat().st_ino
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            _, kind, _, _, pid, inode, *_ = line.split()  # proc(5)
            if kind == "FLOCK" and inode.endswith(f":{number}"):
                stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
                return int(stat.rpartition(") ")[2].split()[1]) == os.getppid()
    except (OSError, ValueError):
        pass
    return False


def _refusal(path: Path, purpose: Purpose, error: OSError | NotImplementedError) -> str:
    """Why a lock cannot be had, and what to do."""
    reason = why_no_locks(error)
    if reason is not None:
        return f"{path}: cannot be locked to {purpose.work}: {reason}: {purpose.remedy}"
    return (
        f"{path}: cannot be locked to {purpose.work} ({error}): make the folder "
        "writable, or choose another"
    )

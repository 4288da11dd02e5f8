"""Turns an exception that nobody expected into one line, and keeps its stack in a log file.

What the operating system refuses is a matter for the user; anything else is a bug. It runs where
memory, handles or space have run out, so it imports nothing that is not there already.
"""

import contextlib
import errno
import logging
import os
import resource
import tempfile
import traceback
from pathlib import Path
from types import TracebackType

from megachat.errors import HostError, InternalError, MegachatError

_SPACE = "free some space, or choose another folder"
_RIGHTS = "give this user the right to it, or choose another folder"
_MEMORY = "use fewer processes, smaller batches or a smaller model, or a machine with more memory"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.EMFILE: "raise the limit with ulimit -n",
    errno.ENFILE: "raise the system's limit, fs.file-max",
    errno.ENOMEM: _MEMORY,
    errno.EIO: "see whether the disk or file server is well",
    errno.ESTALE: "see whether the file server is well",
    errno.ENOTCONN: "see whether the file server is well",
}
"""What the user can do, by what the system answers."""
_LONGEST = 300
"""Characters of an unexpected message that are shown; the stack has all of it."""
_TOLD_BY_LIBRARIES = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Libraries that are not written in Python tell these in the text of errors of their own."""


class RankFileHandler(logging.FileHandler):
    """All lines of one rank, kept in the run folder; stacks go there, too."""


def as_megachat_error(error: BaseException, *, origin: str = "megachat") -> MegachatError:
    """What the user reads of an exception; the stack of an unexpected one goes to a file.

    Args:
        error: What was raised.
        origin: Who raised it, as messages name it.
    """
    if isinstance(error, MegachatError):
        return error
    return refusal_of(error) or InternalError(
        f"internal error on {origin}: {_summary(error)} ({_where(error)}): {keep_stack(error)}"
    )


def refusal_of(error: BaseException) -> HostError | None:
    """The error to raise where the operating system has refused something; None elsewhere."""
    cause: BaseException | None = error
    while cause is not None:
        number = _number_of(cause)
        if number is not None:
            return HostError(f"{_what(cause, number)}: {_REMEDIES[number]}")
        cause = cause.__cause__
    return None


def keep_stack(error: BaseException) -> str:
    """Writes the stack into this process's log file, or a temporary one; returns where it is."""
    handlers = logging.getLogger().handlers
    files = [each for each in handlers if isinstance(each, RankFileHandler)]
    if files:
        record = logging.LogRecord(
            "megachat", logging.CRITICAL, __file__, 0, "internal error", None, _stack_of(error)
        )
        files[0].handle(record)
        return f"its stack is in {_short(Path(files[0].baseFilename))}"
    try:
        number, path = tempfile.mkstemp(prefix="megachat-error-", suffix=".log")
        with os.fdopen(number, "w", encoding="utf-8", errors="replace") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError as refused:
        return f"its stack could not be kept ({refused.strerror})"
    return f"its stack is in {path}"


def _stack_of(
    error: BaseException,
) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    return (type(error), error, error.__traceback__)


def _number_of(error: BaseException) -> int | None:
    """The system's answer, if it is one of those that a user can do something about."""
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    text = str(error)
    if "can't allocate memory" in text or type(error).__name__ == "OutOfMemoryError":  # torch's
        return errno.ENOMEM
    return next((each for each in _TOLD_BY_LIBRARIES if os.strerror(each) in text), None)


def _what(error: BaseException, number: int) -> str:
    """What was refused, where that is known."""
    reason = os.strerror(number).lower()
    if number == errno.EMFILE:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        reason = f"{reason}: this process may have {soft} at once"
    if isinstance(error, OSError) and error.errno == number and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {reason}"
    if isinstance(error, OSError | MemoryError) and not str(error).strip():
        return reason
    return f"{reason} ({_summary(error)})"


def _summary(error: BaseException) -> str:
    """Type and message on one line."""
    message = " ".join(str(error).split())
    if len(message) > _LONGEST:
        message = f"{message[:_LONGEST]} ..."
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _where(error: BaseException) -> str:
    """File and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "nowhere"
    last = frames[-1]
    return f"{'/'.join(Path(last.filename).parts[-3:])}:{last.lineno}"


def _short(path: Path) -> Path:
    """Relative to the working folder where it lies below that."""
    with contextlib.suppress(ValueError, OSError):
        return path.relative_to(Path.cwd())
    return path

"""Turns the signals that ask a process to end into one exception, so that all can end well.

Nothing of this imports torch: it is there before anything that takes long.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from megachat.errors import MegachatError, SignalError
from megachat.telemetry.crash import as_megachat_error

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, what a scheduler sends, the terminal that was closed."""


class Signalled(BaseException):
    """One of `ENDING` has come to this process."""

    def __init__(self, number: int) -> None:
        """Of the signal."""
        super().__init__(number)
        self.number = number


def name_of(number: int) -> str:
    """The name of a signal, for messages."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def told_to_end(number: int, *, while_doing: str = "") -> SignalError:
    """The error that a signal becomes.

    Args:
        number: Of the signal.
        while_doing: What the process was about, where that helps.
    """
    clause = f", while {while_doing}" if while_doing else ""
    error = SignalError(f"the job was ended by {name_of(number)}, as it was told{clause}")
    error.number = number
    return error


def catch_signals() -> None:
    """From now on each of `ENDING` raises `Signalled` in the main thread, the first one alone.

    Those that follow are ignored: they would break the end. What the process was started with
    ignored stays ignored, such as SIGHUP under `nohup`.
    """
    for each in ENDING:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, _react)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """`catch_signals` for the length of the body, where that is not in force already.

    Raises:
        SignalError: A signal has come, and the body did not handle it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    saved = {each: signal.getsignal(each) for each in ENDING}
    catch_signals()
    try:
        yield
    except Signalled as signalled:
        raise told_to_end(signalled.number) from None
    finally:
        if _react not in saved.values():
            for each, handler in saved.items():
                signal.signal(each, handler)


@contextlib.contextmanager
def children_ignore_signals() -> Iterator[None]:
    """Processes that are started in the body ignore `ENDING` from their first moment.

    A terminal sends Ctrl-C to all of its processes. A child that is still importing would write a
    traceback; its launcher decides what becomes of it. A signal that comes meanwhile waits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    saved = {each: signal.signal(each, signal.SIG_IGN) for each in ENDING}
    try:
        yield
    finally:
        for each, handler in saved.items():
            signal.signal(each, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _react(number: int, _: FrameType | None) -> None:
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise Signalled(number)


def report(error: BaseException) -> int:
    """Writes the line that a person reads to standard error; returns the exit status."""
    told = _told(error)
    line = f"{type(told).__name__}: {told}\n"
    try:
        sys.stderr.write(line)
        sys.stderr.flush()
    except OSError:
        pass  # nobody reads it, or the disk that it goes to is full; the status says it still
    return told.exit_code


def _told(error: BaseException) -> MegachatError:
    if isinstance(error, Signalled):
        return told_to_end(error.number)
    if isinstance(error, KeyboardInterrupt):
        return told_to_end(signal.SIGINT)
    return as_megachat_error(error)

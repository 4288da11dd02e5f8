"""Ends this process, or the ranks that it has started, when the job ends.

A rank may be inside a collective and hear of nothing, so a thread of its own listens for it.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, NoReturn

from megachat.parallel.failures import Failure, Severity, Signalled, failure_of, first_cause
from megachat.parallel.lifeline import CAUSE_SECONDS, News
from megachat.parallel.local_ranks import LocalRanks
from megachat.parallel.rendezvous import FAREWELL_SECONDS, Meeting


class Watcher:
    """A thread that ends this rank when the job fails elsewhere.

    The main thread may be inside a collective and hear of nothing.
    """

    def __init__(self, meeting: Meeting) -> None:
        """Starts to listen."""
        self._meeting = meeting
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._thread.start()

    def leave(self, failure: Failure) -> NoReturn:
        """Tells all others of a failure and ends this process."""
        self._meeting.line.report(failure)
        self._thread.join(FAREWELL_SECONDS)  # the thread ends the process with what came first
        end_process(failure)

    def finish(self) -> None:
        """Waits until all ranks are done."""
        self._meeting.line.done()
        self._thread.join()
        self._meeting.close()

    def _watch(self) -> None:
        news = self._meeting.listen(timeout=None)
        if news is not None and news.failure is not None:
            self._meeting.close()
            end_process(news.failure)


def end_process(failure: Failure) -> NoReturn:
    """Writes a message, as the command line would, and ends this process without any teardown."""
    error = failure.error()
    os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace"))
    os._exit(failure.exit_code)


def watch_ranks(ranks: LocalRanks, meeting: Meeting) -> News:
    """How the job ends; the caller then ends what is left of the ranks.

    The first rank to speak may be one that lost a peer of this very node: what is no cause by
    itself waits a little for the cause.
    """
    told = False
    heard: list[Failure] = []
    decide: float | None = None
    while True:
        patience = None if decide is None else max(0.0, decide - time.monotonic())
        ready: list[Any] = wait([meeting.line.fileno(), *ranks.handles], patience)
        if meeting.line.fileno() in ready:
            news = meeting.listen(timeout=0.0)
            if news is not None:
                return news
        heard += ranks.collect()
        if heard:
            decide = decide or time.monotonic() + CAUSE_SECONDS
            first = first_cause(heard)
            if first.severity is Severity.CAUSE or time.monotonic() >= decide:
                return News(meeting.fail(first))
        elif ranks.all_done and not told:
            meeting.line.done()
            told = True


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Signalled` once; then they are ignored, so that all can end well.

    Raises:
        LaunchError: One has come, and the body did not handle it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def react(number: int, _: FrameType | None) -> None:
        for each in saved:
            signal.signal(each, signal.SIG_IGN)
        raise Signalled(number)

    saved = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for each in saved:
        signal.signal(each, react)
    try:
        yield
    except Signalled as signalled:
        raise failure_of(signalled, origin="the launcher").error() from None
    finally:
        for each, handler in saved.items():
            signal.signal(each, handler)

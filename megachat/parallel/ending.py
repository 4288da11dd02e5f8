"""Ends this process, or the ranks that it has started, when the job ends.

A rank may be inside a collective and hear of nothing, so a thread of its own listens for it.
"""

import os
import signal
import threading
import time
from multiprocessing.connection import wait
from typing import Any, NoReturn

from megachat.parallel.failures import Failure, Severity, first_cause, told_to_end
from megachat.parallel.lifeline import CAUSE_SECONDS, News
from megachat.parallel.local_ranks import LocalRanks
from megachat.parallel.rendezvous import FAREWELL_SECONDS, Meeting
from megachat.parallel.signals import ENDING

_ends = threading.Lock()
"""Held by the thread that ends this process."""


_DEATH_SECONDS = 1.0
"""How long a look at ranks waits for more of one that is dying."""


class Watcher:
    """A thread that ends this rank when the job fails elsewhere.

    The main thread may be inside a collective and hear of nothing.
    """

    def __init__(self, meeting: Meeting) -> None:
        """Starts to listen."""
        self._meeting = meeting
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._thread.start()
        self._hear_signals()

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

    def _hear_signals(self) -> None:
        """Lets a signal end this rank though its main thread is inside a collective.

        Python runs handlers in the main thread alone, between two of its steps.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._obey, args=(reader,), name="signals", daemon=True).start()

    def _obey(self, reader: int) -> None:
        for number in iter(lambda: os.read(reader, 1)[0], None):
            if number in ENDING:
                self.leave(told_to_end(number))

    def _watch(self) -> None:
        news = self._meeting.listen(timeout=None)
        if news is not None and news.failure is not None:
            self._meeting.close()
            end_process(news.failure)


def end_process(failure: Failure) -> NoReturn:
    """Writes a message, as the command line would, and ends this process without any teardown."""
    _ends.acquire()  # for good: of two threads that come here the first one speaks
    error = failure.error()
    os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace"))
    os._exit(error.exit_code)


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
            if first.severity is not Severity.CAUSE and ranks.one_is_dying:
                decide = max(decide, time.monotonic() + _DEATH_SECONDS)
            if first.severity is Severity.CAUSE or time.monotonic() >= decide:
                return News(meeting.fail(first))
        elif ranks.all_done and not told:
            meeting.line.done()
            told = True

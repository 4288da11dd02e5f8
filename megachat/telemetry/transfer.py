"""Shows a person how far a long reading or writing of files is: `TransferProgress`.

Bytes done of all, bytes a second and time left: on a terminal one live line, elsewhere a log line
every few seconds. What ends within two seconds is not worth a line and leaves none.
"""

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from megachat.telemetry.log import active_console
from megachat.telemetry.progress import LOG_INTERVAL_S, format_duration

QUIET_S = 2.0
"""Seconds before the first line."""

logger = logging.getLogger(__name__)


class TransferProgress:
    """Shows one transfer while its body runs.

    ```
    with TransferProgress("loading opt-66b", total=132 * 10**9) as progress:
        for part in parts:
            progress.show(bytes_so_far)
    ```
    """

    def __init__(
        self,
        title: str,
        *,
        total: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares the view.

        Args:
            title: What is done, for a person.
            total: Bytes that there are to move.
            console: Where to show; None means the console of this process's logging, if it has one.
            clock: Monotonic seconds.
        """
        self._title = title
        self._total = total
        self._clock = clock
        self._console = console or active_console()
        self._started = self._last_line = clock()
        self._done = 0
        self._live: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        """Starts the clock."""
        self._started = self._last_line = self._clock()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Takes the view away; a transfer that took its time leaves a line."""
        if self._live is not None:
            self._live.stop()
        elapsed = self._clock() - self._started
        if self._console is None or elapsed < QUIET_S:
            return
        end = f"stopped by {kind.__name__}: " if kind is not None else ""
        logger.info(
            "%s: %s%s in %s%s",
            self._title,
            end,
            format_bytes(self._done),
            format_duration(elapsed),
            self._rate(elapsed),
        )

    @property
    def is_shown(self) -> bool:
        """Whether anyone sees it here: on rank 0, as log lines."""
        return self._console is not None

    def show(self, done: int) -> None:
        """Shows that `done` bytes have been moved so far."""
        self._done = done
        now = self._clock()
        if self._console is None or now - self._started < QUIET_S:
            return
        elapsed = now - self._started
        text = f"{format_bytes(done)}/{format_bytes(self._total)}{self._rate(elapsed)}"
        if done:
            left = elapsed / done * max(self._total - done, 0)
            text += f", {format_duration(left)} left"
        if self._console.is_terminal:
            self._show_live(self._console, text)
        elif now - self._last_line >= LOG_INTERVAL_S or self._last_line == self._started:
            self._last_line = now
            logger.info("%s: %s", self._title, text)

    def _rate(self, elapsed: float) -> str:
        return f", {format_bytes(self._done / elapsed)}/s" if elapsed > 0 and self._done else ""

    def _show_live(self, console: Console, text: str) -> None:
        if self._live is None:
            self._live = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}", style="cyan", markup=False),
                console=console,
                transient=True,
            )
            self._task = self._live.add_task(self._title, total=max(self._total, 1), text=text)
            self._live.start()
        assert self._task is not None
        self._live.update(self._task, completed=self._done, text=text)


def format_bytes(count: float) -> str:
    """A number of bytes for a person: `512 B`, `12.3 MB`, `132 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

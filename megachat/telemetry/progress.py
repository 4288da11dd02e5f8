"""The one place that shows a person how far a stage is: `StageProgress`.

On a terminal it is one live line: which stage of how many, step of how many, time left and a few
current metrics. Elsewhere (a file, a pipe, CI) it is a log line every few seconds. It shows where
log lines of this process show (`telemetry.log`), hence on rank 0 alone.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from megachat.telemetry.log import active_console

LOG_INTERVAL_S = 10.0
"""Seconds between two log lines where there is no terminal."""
METRICS_SHOWN = 4
"""How many metrics a line has room for where the stage does not choose them."""

logger = logging.getLogger(__name__)


class _View(Protocol):
    """One way of showing progress."""

    def start(self) -> None:
        """Shows the stage at its first step."""

    def show(self, step: int, *, left: str, metrics: str) -> None:
        """Shows the stage at `step`."""

    def stop(self) -> None:
        """Takes the view away."""


class StageProgress:
    """Shows one stage while its body runs.

    ```
    with StageProgress("SFT", total=300, number=1, num_stages=4) as progress:
        for batch in loader:
            progress.advance({"sft/loss": loss})
    ```
    """

    def __init__(
        self,
        title: str,
        *,
        total: int,
        number: int = 1,
        num_stages: int = 1,
        show: Sequence[str] = (),
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares the view; nothing is shown before the `with` statement enters.

        Args:
            title: Name of the stage for a person.
            total: Steps that the stage will take.
            number: Which stage of the run this is, from 1.
            num_stages: How many stages the run has.
            show: Names of the metrics to show; empty means the first few of each step.
            console: Where to show; None means the console of this process's logging, if it has one.
            clock: Monotonic seconds.
        """
        self._title = f"[{number}/{num_stages}] {title}" if num_stages > 1 else title
        self._total = total
        self._show = tuple(show)
        self._clock = clock
        self._step = 0
        self._metrics: dict[str, float] = {}
        self._started = clock()
        self._view = self._choose_view(console or active_console())

    def __enter__(self) -> Self:
        """Starts the clock and the view."""
        self._started = self._clock()
        self._view.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Takes the view away and leaves one line that says how the stage ended."""
        self._view.stop()
        elapsed = format_duration(self._clock() - self._started)
        parts = [f"{self._step}/{self._total} steps in {elapsed}", self._metrics_text()]
        if kind is not None:
            parts.insert(0, f"stopped by {kind.__name__}")
        logger.info("%s: %s", self._title, ", ".join(part for part in parts if part))

    def advance(self, metrics: Mapping[str, float] | None = None, *, steps: int = 1) -> None:
        """Counts finished steps.

        Args:
            metrics: Current values by `group/name`; those not given keep their last value.
            steps: How many steps were finished.
        """
        self._step += steps
        self._metrics.update(metrics or {})
        self._view.show(self._step, left=self._time_left(), metrics=self._metrics_text())

    def _time_left(self) -> str:
        if self._step == 0:
            return ""
        elapsed = self._clock() - self._started
        remaining = max(self._total - self._step, 0)
        return f"{format_duration(elapsed / self._step * remaining)} left"

    def _metrics_text(self) -> str:
        names = self._show or tuple(self._metrics)[:METRICS_SHOWN]
        return "  ".join(
            f"{name.rpartition('/')[2]} {format_value(self._metrics[name])}"
            for name in names
            if name in self._metrics
        )

    def _choose_view(self, console: Console | None) -> _View:
        if console is None:
            return _SilentView()
        if console.is_terminal:
            return _LiveView(console, title=self._title, total=self._total)
        return _LogView(title=self._title, total=self._total, clock=self._clock)


class _SilentView:
    """The view of ranks that show nothing."""

    def start(self) -> None:
        """Shows nothing."""

    def show(self, step: int, *, left: str, metrics: str) -> None:
        """Shows nothing."""

    def stop(self) -> None:
        """Shows nothing."""


class _LogView:
    """A log line every `LOG_INTERVAL_S` seconds."""

    def __init__(self, *, title: str, total: int, clock: Callable[[], float]) -> None:
        self._title = title
        self._total = total
        self._clock = clock
        self._last_line = clock()

    def start(self) -> None:
        logger.info("%s: %d steps", self._title, self._total)
        self._last_line = self._clock()

    def show(self, step: int, *, left: str, metrics: str) -> None:
        now = self._clock()
        if now - self._last_line >= LOG_INTERVAL_S and step < self._total:
            self._last_line = now
            tail = f"  {metrics}" if metrics else ""
            logger.info("%s: %d/%d  %s%s", self._title, step, self._total, left, tail)

    def stop(self) -> None:
        """Leaves the last words to the stage."""


class _LiveView:
    """One line that stays in place, with log lines scrolling above it."""

    def __init__(self, console: Console, *, title: str, total: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", style="cyan"),
            TextColumn("{task.fields[metrics]}", style="dim", markup=False),
            console=console,
            transient=True,
        )
        self._title = title
        self._total = total
        self._task: TaskID | None = None

    def start(self) -> None:
        self._task = self._progress.add_task(self._title, total=self._total, left="", metrics="")
        self._progress.start()

    def show(self, step: int, *, left: str, metrics: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=step, left=left, metrics=metrics)

    def stop(self) -> None:
        self._progress.stop()


def format_value(value: float) -> str:
    """A measured value for a person: `0.0123`, `2.31`, `12,346`."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """Seconds for a person: `0.4s`, `42s`, `3m07s`, `2h05m`."""
    if seconds < 1:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"

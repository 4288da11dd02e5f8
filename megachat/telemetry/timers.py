"""The one place that measures where the time of a stage goes: `PhaseTimers`."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SEPARATOR = "/"


def nothing_to_wait_for() -> None:
    """The default synchronisation: work is done when the call that does it returns."""


@dataclass(slots=True)
class _OpenPhase:
    """A phase that has been entered and not yet left."""

    path: str
    start: float


@dataclass(slots=True)
class _Closed:
    """What is known of the finished visits to one phase."""

    seconds: float = 0.0
    visits: int = 0


@dataclass(frozen=True, slots=True)
class PhaseTimers:
    """Adds up wall-clock seconds by phase; phases may be nested and entered any number of times.

    ```
    timers = PhaseTimers()
    with timers.phase("experience"):
        with timers.phase("generate"):
            ...
    timers.totals()  # {"experience": 2.0, "experience/generate": 1.5}
    ```

    A phase inside another is named by its path. Work that was queued on a device and has not run
    yet belongs to the phase that queued it, hence `synchronize`, called at both ends of each phase.
    """

    synchronize: Callable[[], None] = nothing_to_wait_for
    """Waits until the device has done what was asked of it; the CPU needs no waiting."""
    clock: Callable[[], float] = time.perf_counter
    """Monotonic seconds."""
    _closed: dict[str, _Closed] = field(default_factory=dict, init=False)
    _open: list[_OpenPhase] = field(default_factory=list, init=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time spent in the body, also when the body raises.

        Raises:
            ValueError: The name is empty or contains the separator of paths.
        """
        if not name or SEPARATOR in name:
            raise ValueError(f"phase {name!r}: a name must not be empty or contain '{SEPARATOR}'")
        path = f"{self._open[-1].path}{SEPARATOR}{name}" if self._open else name
        self._closed.setdefault(path, _Closed())  # keeps phases in the order of first entry
        self.synchronize()
        entered = _OpenPhase(path, self.clock())
        self._open.append(entered)
        try:
            yield
        finally:
            self.synchronize()
            self._open.pop()
            closed = self._closed.setdefault(path, _Closed())
            closed.seconds += self.clock() - entered.start
            closed.visits += 1

    def totals(self) -> dict[str, float]:
        """Seconds by path of the finished visits, time of inner phases included."""
        return {path: closed.seconds for path, closed in self._closed.items() if closed.visits}

    def self_totals(self) -> dict[str, float]:
        """Seconds by path without the time of inner phases: these add up to the whole."""
        own = self.totals()
        for path, seconds in self.totals().items():
            parent, _, _ = path.rpartition(SEPARATOR)
            if parent in own:
                own[parent] -= seconds
        return own

    def counts(self) -> dict[str, int]:
        """Finished visits by path."""
        return {path: closed.visits for path, closed in self._closed.items() if closed.visits}

    def reset(self) -> None:
        """Forgets finished visits; of a phase that is open, only time from now on will count."""
        self._closed.clear()
        now = self.clock()
        for phase in self._open:
            phase.start = now

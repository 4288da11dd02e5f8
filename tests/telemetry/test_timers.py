"""Phase timers on a clock that the test turns."""

from dataclasses import dataclass

import pytest

from megachat.telemetry.timers import PhaseTimers


@dataclass
class Clock:
    """Seconds that pass when the test says so."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_visits_to_a_phase_add_up() -> None:
    clock = Clock()
    timers = PhaseTimers(clock=clock)
    for seconds in (1.0, 2.5):
        with timers.phase("generate"):
            clock.wait(seconds)
        clock.wait(10.0)
    assert timers.totals() == {"generate": 3.5}
    assert timers.counts() == {"generate": 2}


def test_an_inner_phase_is_named_by_its_path_and_counts_in_the_outer_one() -> None:
    clock = Clock()
    timers = PhaseTimers(clock=clock)
    with timers.phase("experience"):
        clock.wait(1.0)
        with timers.phase("generate"):
            clock.wait(3.0)
        with timers.phase("score"):
            clock.wait(0.5)
    assert timers.totals() == {
        "experience": 4.5,
        "experience/generate": 3.0,
        "experience/score": 0.5,
    }
    assert timers.self_totals() == {
        "experience": 1.0,
        "experience/generate": 3.0,
        "experience/score": 0.5,
    }


def test_self_totals_add_up_to_the_time_of_the_outermost_phases() -> None:
    clock = Clock()
    timers = PhaseTimers(clock=clock)
    for depth in range(4):
        with timers.phase("a"), timers.phase("b"):
            clock.wait(depth)
            with timers.phase("c"):
                clock.wait(2 * depth)
        clock.wait(1.0)
    assert sum(timers.self_totals().values()) == timers.totals()["a"]


def test_the_device_is_waited_for_at_both_ends() -> None:
    clock = Clock()
    queued = [5.0, 2.0]  # seconds of device work outstanding at each synchronisation
    timers = PhaseTimers(clock=clock, synchronize=lambda: clock.wait(queued.pop(0)))
    with timers.phase("train"):
        clock.wait(1.0)
    assert queued == []
    assert timers.totals() == {"train": 3.0}  # the 5 s belong to what came before


def test_a_phase_that_raises_is_counted_and_left() -> None:
    clock = Clock()
    timers = PhaseTimers(clock=clock)
    with pytest.raises(RuntimeError), timers.phase("a"):
        clock.wait(1.0)
        raise RuntimeError
    with timers.phase("b"):
        clock.wait(2.0)
    assert timers.totals() == {"a": 1.0, "b": 2.0}


def test_reset_forgets_what_is_over_and_restarts_what_is_open() -> None:
    clock = Clock()
    timers = PhaseTimers(clock=clock)
    with timers.phase("a"):
        clock.wait(7.0)
        timers.reset()
        assert timers.totals() == {}
        clock.wait(2.0)
    assert timers.totals() == {"a": 2.0}
    assert timers.counts() == {"a": 1}


@pytest.mark.parametrize("name", ["", "a/b"])
def test_names_that_would_confuse_paths_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="phase"), PhaseTimers().phase(name):
        pass

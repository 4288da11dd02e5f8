import io
import logging

import pytest
from rich.console import Console

from megachat.telemetry import transfer
from megachat.telemetry.transfer import TransferProgress, format_bytes


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def test_a_long_transfer_logs_bytes_rate_and_time_left_every_few_seconds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = _Clock()
    with (
        caplog.at_level(logging.INFO, logger=transfer.__name__),
        TransferProgress(
            "loading x", total=100 * 10**9, console=_console(terminal=False), clock=clock
        ) as progress,
    ):
        for second in range(51):
            clock.now = float(second)
            progress.show(second * 2 * 10**9)
    assert [record.message for record in caplog.records] == [
        "loading x: 4 GB/100 GB, 2 GB/s, 48s left",
        "loading x: 24 GB/100 GB, 2 GB/s, 38s left",
        "loading x: 44 GB/100 GB, 2 GB/s, 28s left",
        "loading x: 64 GB/100 GB, 2 GB/s, 18s left",
        "loading x: 84 GB/100 GB, 2 GB/s, 8s left",
        "loading x: 100 GB in 50s, 2 GB/s",
    ]


def test_a_short_transfer_leaves_no_line(caplog: pytest.LogCaptureFixture) -> None:
    clock = _Clock()
    with (
        caplog.at_level(logging.INFO, logger=transfer.__name__),
        TransferProgress("x", total=8, console=_console(terminal=False), clock=clock) as progress,
    ):
        clock.now = 1.9
        progress.show(8)
    assert caplog.records == []


def test_other_ranks_show_nothing(caplog: pytest.LogCaptureFixture) -> None:
    clock = _Clock()
    with (
        caplog.at_level(logging.INFO, logger=transfer.__name__),
        TransferProgress("x", total=8, clock=clock) as progress,
    ):
        clock.now = 100.0
        progress.show(8)
        assert not progress.is_shown
    assert caplog.records == []


def test_a_transfer_that_stops_says_how_far_it_came(caplog: pytest.LogCaptureFixture) -> None:
    clock = _Clock()
    with (
        caplog.at_level(logging.INFO, logger=transfer.__name__),
        pytest.raises(ValueError, match="no more"),
        TransferProgress("x", total=8, console=_console(terminal=False), clock=clock) as progress,
    ):
        progress.show(4)
        clock.now = 4.0
        raise ValueError("no more")
    assert caplog.records[-1].message == "x: stopped by ValueError: 4 B in 4s, 1 B/s"


def test_a_terminal_gets_one_live_line() -> None:
    clock, console = _Clock(), _console(terminal=True)
    with TransferProgress("loading x", total=10**9, console=console, clock=clock) as progress:
        clock.now = 5.0
        progress.show(5 * 10**8)
    file = console.file
    assert isinstance(file, io.StringIO)
    assert "500 MB/1 GB, 100 MB/s, 5s left" in file.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_340_000, "12.3 MB"), (350e9, "350 GB")],
)
def test_bytes_are_counted_in_thousands(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_the_largest_models_are_counted_in_terabytes() -> None:
    assert format_bytes(1.4e12) == "1.4 TB"

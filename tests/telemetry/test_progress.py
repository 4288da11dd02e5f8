"""The progress view, on a terminal, in a file and on ranks that show nothing."""

import io
import logging

import pytest
from rich.console import Console

from megachat.telemetry import progress as progress_module
from megachat.telemetry.progress import StageProgress, format_duration, format_value


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_stage(console: Console, clock: Clock, *, seconds_per_step: float = 4.0) -> None:
    with StageProgress(
        "PPO", total=10, number=3, num_stages=4, console=console, clock=clock
    ) as progress:
        for step in range(10):
            clock.now += seconds_per_step
            progress.advance({"rlhf/reward": step / 10})


def test_without_a_terminal_lines_are_logged_now_and_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    run_stage(Console(file=io.StringIO()), Clock())
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "[3/4] PPO: 10 steps",
        "[3/4] PPO: 3/10  28s left  reward 0.2",
        "[3/4] PPO: 6/10  16s left  reward 0.5",
        "[3/4] PPO: 9/10  4s left  reward 0.8",
        "[3/4] PPO: 10/10 steps in 40s, reward 0.9",
    ]


def test_on_a_terminal_one_line_is_kept_up_to_date(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, color_system=None)
    clock = Clock()
    with StageProgress(
        "PPO", total=10, number=3, num_stages=4, console=console, clock=clock
    ) as progress:
        clock.now = 5.0
        progress.advance({"rlhf/reward": 0.25})
    shown = file.getvalue()
    assert "[3/4] PPO" in shown
    assert "1/10" in shown
    assert "45s left" in shown
    assert "reward 0.25" in shown
    assert [r.getMessage() for r in caplog.records] == ["[3/4] PPO: 1/10 steps in 5s, reward 0.25"]


def test_a_process_without_a_console_shows_nothing_live(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "active_console", lambda: None)
    with StageProgress("SFT", total=2) as progress:
        progress.advance()
        progress.advance({"sft/loss": 1.0})
    assert capsys.readouterr().out == ""


def test_an_error_is_named_and_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with (
        pytest.raises(RuntimeError),
        StageProgress("SFT", total=2, console=Console(file=io.StringIO())) as progress,
    ):
        progress.advance()
        raise RuntimeError
    assert "SFT: stopped by RuntimeError, 1/2 steps" in caplog.records[-1].getMessage()


def test_chosen_metrics_are_shown_and_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    console = Console(file=io.StringIO())
    with StageProgress("PPO", total=1, show=("rlhf/kl", "rlhf/absent"), console=console) as stage:
        stage.advance({"rlhf/reward": 1.0, "rlhf/kl": 0.125})
    assert caplog.records[-1].getMessage().endswith(", kl 0.125")


def test_metrics_without_a_finished_step_leave_the_time_open() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, color_system=None)
    with StageProgress("PPO", total=1, console=console) as progress:
        progress.advance({"rlhf/kl": 0.5}, steps=0)
    assert "left" not in file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4s"),
        (1.0, "1s"),
        (59.6, "1m00s"),
        (187.0, "3m07s"),
        (3599.7, "1h00m"),
        (7500.0, "2h05m"),
    ],
)
def test_durations_read_as_a_person_says_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.012345, "0.0123"),
        (2.3149, "2.31"),
        (999.4, "999"),
        (-12345.6, "-12,346"),
        (3e12, "3e+12"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_values_read_as_a_person_says_them(value: float, text: str) -> None:
    assert format_value(value) == text

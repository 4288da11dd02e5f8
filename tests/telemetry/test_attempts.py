"""What earlier attempts left is kept, by number, and is no part of the present one."""

from pathlib import Path

import pytest

from megachat.telemetry.attempts import ATTEMPTS_FOLDER, set_aside
from megachat.telemetry.log import start_log_files
from megachat.telemetry.metrics import METRICS_FILE, MetricsWriter
from megachat.telemetry.report import read_stages


def _record(folder: Path, value: float) -> None:
    with MetricsWriter(folder) as writer:
        writer.write(0, {"sft/loss": value})


def test_each_attempt_is_kept_under_the_next_number(tmp_path: Path) -> None:
    assert set_aside(tmp_path, []) is None and list(tmp_path.iterdir()) == []
    (tmp_path / ATTEMPTS_FOLDER / "9").mkdir(parents=True)
    (tmp_path / ATTEMPTS_FOLDER / "notes").mkdir()
    for number in (10, 11):
        (tmp_path / "a").write_text(str(number))
        (tmp_path / "folder").mkdir()
        place = set_aside(tmp_path, [tmp_path / "a", tmp_path / "folder"])
        assert place == tmp_path / ATTEMPTS_FOLDER / str(number)
        assert (place / "a").read_text() == str(number) and (place / "folder").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == [ATTEMPTS_FOLDER]


def test_a_report_has_the_metrics_of_the_present_attempt_alone(tmp_path: Path) -> None:
    stage = tmp_path / "sft"
    _record(stage, 1.0)
    set_aside(stage, [stage / METRICS_FILE])
    assert read_stages(tmp_path) == {}
    _record(stage, 2.0)
    [(name, history)] = read_stages(tmp_path).items()
    assert name == "sft" and history.series("sft/loss") == [(0, 2.0)]


def test_a_run_folder_below_a_folder_of_attempts_has_a_report_too(tmp_path: Path) -> None:
    run = tmp_path / ATTEMPTS_FOLDER / "run"
    _record(run / "sft", 1.0)
    assert list(read_stages(run)) == ["sft"]


def test_log_files_of_all_ranks_are_set_aside_together(tmp_path: Path) -> None:
    start_log_files(tmp_path / "logs")  # the first run has no folder yet
    (tmp_path / "logs").mkdir()
    for rank in range(2):
        (tmp_path / "logs" / f"rank_{rank:03d}.log").write_text("old")
    start_log_files(tmp_path / "logs")
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.log"))
    assert left == ["logs/attempts/1/rank_000.log", "logs/attempts/1/rank_001.log"]


def test_what_cannot_be_moved_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / ATTEMPTS_FOLDER).touch()
    with pytest.raises(OSError):
        set_aside(tmp_path, [tmp_path / "a"])
    assert (tmp_path / "a").exists()

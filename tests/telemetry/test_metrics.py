"""Metrics files: what is written is what is read, whatever happens in between."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megachat.errors import ConfigError, DataError
from megachat.telemetry.metrics import (
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    MetricsWriter,
    NullMetricsWriter,
    open_metrics,
    read_metrics,
)


def test_values_are_on_disk_as_soon_as_write_returns(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"rlhf/kl": 0.5, "perf/tokens_per_s": 12.0})
        writer.write(2, {"rlhf/kl": 0.25})
        history = read_metrics(tmp_path)
        assert history.series("rlhf/kl") == [(1, 0.5), (2, 0.25)]
        assert history.names == ["rlhf/kl", "perf/tokens_per_s"]
        assert history.last("perf/tokens_per_s") == 12.0
        assert history.last("rlhf/entropy") is None


def test_every_line_is_valid_json_even_for_values_that_json_does_not_know(tmp_path: Path) -> None:
    values = {"a/nan": math.nan, "a/up": math.inf, "a/down": -math.inf}
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, values)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(line, parse_constant=refuse)["metrics"]["a/nan"] == "NaN"
    read = read_metrics(tmp_path).rows[0].values
    assert math.isnan(read["a/nan"])
    assert read["a/up"] == math.inf
    assert read["a/down"] == -math.inf


def test_tensorboard_shows_the_same_values(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"sft/loss": 3.0})
        writer.write(2, {"sft/loss": 2.5})
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("sft/loss")] == [(1, 3.0), (2, 2.5)]


def test_a_new_writer_continues_after_a_line_cut_short_by_a_crash(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a/b": 1.0})
        writer.write(2, {"a/b": 2.0})
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-9])
    assert read_metrics(tmp_path).series("a/b") == [(1, 1.0)]
    with MetricsWriter(tmp_path) as writer:
        writer.write(2, {"a/b": 3.0})
    assert read_metrics(tmp_path).series("a/b") == [(1, 1.0), (2, 3.0)]


def test_of_a_step_repeated_after_a_resume_the_last_value_counts(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0)):
            writer.write(step, {"a/b": value})
    assert read_metrics(tmp_path).series("a/b") == [(1, 1.0), (2, 20.0), (3, 3.0)]
    assert len(read_metrics(tmp_path).rows) == 4


def test_a_malformed_line_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "time": 1, "metrics": {}}\n[1]\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a metrics line"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("name", ["kl", "rlhf/", "/kl", "rlhf//kl", "rlhf/the kl", ""])
@pytest.mark.parametrize("rank", [0, 1])
def test_names_without_a_group_are_refused_on_every_rank(
    tmp_path: Path, name: str, rank: int
) -> None:
    with open_metrics(tmp_path, rank=rank) as sink, pytest.raises(ValueError, match="group/name"):
        sink.write(1, {name: 1.0})


def test_only_rank_0_writes(tmp_path: Path) -> None:
    with open_metrics(tmp_path, rank=1) as sink:
        assert isinstance(sink, NullMetricsWriter)
        sink.write(1, {"a/b": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert read_metrics(tmp_path).rows == ()


def test_a_folder_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write metrics"):
        MetricsWriter(tmp_path / "file")


@settings(deadline=None, max_examples=15)
@given(values=st.lists(st.floats(), min_size=1, max_size=3))
def test_any_float_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("metrics")
    with MetricsWriter(folder) as writer:
        for step, value in enumerate(values):
            writer.write(step, {"a/b": value})
    read = [value for _, value in read_metrics(folder).series("a/b")]
    assert [repr(value) for value in read] == [repr(value) for value in values]

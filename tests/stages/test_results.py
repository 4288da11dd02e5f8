"""Result files: written whole or not at all, and refused when they are not what they should be."""

import json
import math
import os
from pathlib import Path

import pytest

from megachat.errors import CheckpointError, ConfigError
from megachat.parallel.peak_memory import MemoryMeasure, MemoryPeak
from megachat.stages.results import (
    RESULT_FILE,
    Reply,
    ReshardCost,
    StageMemory,
    StageResult,
    fingerprint,
    read_result,
    write_json,
    write_result,
)

RESULT = StageResult(
    fingerprint="abc",
    seconds=12.5,
    metrics={"perplexity_after": 3.25, "steps": 7},
    phase_seconds={"generate": 4.0},
    replies=[Reply(prompt="hi", before="no", after="yes\n")],
    reshard=ReshardCost(
        train="tp2.pp2.dp1",
        generate="tp2.pp1.dp2",
        count=3,
        seconds=0.25,
        received_bytes=4096.0,
        redundant_bytes=0.0,
    ),
    memory=StageMemory(least_bytes=2, most_bytes=4, most_rank=1, measure="something"),
)


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_result(tmp_path) is None
    write_result(tmp_path, RESULT)
    assert read_result(tmp_path) == RESULT
    assert [path.name for path in tmp_path.iterdir()] == [RESULT_FILE]


def test_a_figure_that_does_not_exist_is_null_and_comes_back(tmp_path: Path) -> None:
    result = StageResult(fingerprint="a", seconds=0.0, metrics={"x": None, "y": 1.0})
    write_result(tmp_path, result)
    assert json.loads((tmp_path / RESULT_FILE).read_text())["metrics"] == {"x": None, "y": 1.0}
    assert read_result(tmp_path) == result


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_written(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_result(tmp_path, StageResult(fingerprint="a", seconds=0.0, metrics={"x": value}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '"abc"',
        "7",
        "null",
        '{"fingerprint": "abc"}',
        json.dumps({"fingerprint": "abc", "seconds": 1, "metrics": {}, "replies": [{"prompt": 1}]}),
        json.dumps({"fingerprint": "abc", "seconds": 1, "metrics": {}, "replies": [], "more": 1}),
        json.dumps({"seconds": 1, "metrics": {}, "replies": []}),
        json.dumps(
            {
                "fingerprint": "abc",
                "seconds": 1,
                "metrics": {},
                "replies": [],
                "reshard": {"seconds": 1},
            }
        ),
        "\udcff",
    ],
)
def test_a_corrupt_result_is_refused_with_what_to_do(text: str, tmp_path: Path) -> None:
    (tmp_path / RESULT_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError) as caught:
        read_result(tmp_path)
    message = str(caught.value)
    assert RESULT_FILE in message and f"delete the folder {tmp_path}" in message
    assert "\n" not in message


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "values.json"
    write_json(path, {"a": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="cannot write: No space left on device"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write: No such file or directory"):
        write_json(tmp_path / "missing" / "values.json", {})


def test_fingerprints_depend_on_values_and_not_on_their_order() -> None:
    first = fingerprint({"a": 1, "b": {"c": [1, 2], "d": None}})
    assert first == fingerprint({"b": {"d": None, "c": [1, 2]}, "a": 1})
    others = [
        fingerprint({"a": 1, "b": {"c": [2, 1], "d": None}}),
        fingerprint({"a": 1.5, "b": {"c": [1, 2], "d": None}}),
        fingerprint({"a": 1, "b": {"c": [1, 2]}}),
    ]
    assert len({first, *others}) == 4


def test_a_result_of_an_older_version_without_memory_is_a_completed_stage(tmp_path: Path) -> None:
    write_result(tmp_path, RESULT)
    values = json.loads((tmp_path / RESULT_FILE).read_text(encoding="utf-8"))
    del values["memory"]
    (tmp_path / RESULT_FILE).write_text(json.dumps(values), encoding="utf-8")
    found = read_result(tmp_path)
    assert found is not None and found.memory is None and found.metrics == RESULT.metrics


def test_the_memory_of_a_stage_names_the_first_rank_with_the_most() -> None:
    peaks = [MemoryPeak(num_bytes=size, measure=MemoryMeasure.STAGE) for size in (5, 9, 3, 9)]
    found = StageMemory.of_ranks(peaks)
    assert (found.least_bytes, found.most_bytes, found.most_rank) == (3, 9, 1)
    assert found.measure == "resident set of the process, since the stage began"

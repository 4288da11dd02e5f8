import logging
from pathlib import Path
from typing import Any

import pytest

from megachat.data.arrow import open_arrow
from megachat.data.cache import DataCache
from megachat.data.chat import ChatConfig
from megachat.data.config import SourceConfig
from megachat.data.conversion import (
    ConversionReport,
    check_reports,
    convert_source,
    read_reports,
)
from megachat.data.sources import open_source
from megachat.errors import DataError
from tests.data.samples import pair, pairs, write_jsonl

BAD: list[Any] = [
    {"prompt": "x"},
    {"prompt": "", "chosen": "y"},
    {"prompt": "x", "chosen": 5},
    "{not json",
    {"prompt": "x", "chosen": " y", "rejected": " y"},
]
"""One of each kind of unusable row."""


def convert(tmp_path: Path, rows: list[Any], **options: Any) -> tuple[SourceConfig, Path]:
    """Converts a JSONL file; returns the source and the folder of rows."""
    path = write_jsonl(tmp_path / "in" / "rows.jsonl", rows)
    source = SourceConfig(name="mine", path=path, **options)
    folder = tmp_path / "out"
    folder.mkdir()
    opened = open_source(source, cache=DataCache(tmp_path / "cache"))
    convert_source(source, opened, folder, chat=ChatConfig())
    return source, folder


def test_rows_come_out_in_order(tmp_path: Path) -> None:
    _, folder = convert(tmp_path, pairs(2500))
    assert open_arrow(folder / "train.arrow").to_list() == pairs(2500)
    assert read_reports(folder) == {
        "train": ConversionReport(
            records=2500,
            rows=2500,
            format="common",
            found="100 of the first 100 records have prompt, chosen and, for pairs, rejected",
            serving={"sft": 2500, "reward": 2500, "prompts": 2500},
        )
    }


def test_bad_rows_are_counted_and_named_with_file_and_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _, folder = convert(tmp_path, [pair(0), *BAD, pair(1)])
    report = read_reports(folder)["train"]
    assert (report.records, report.rows, report.bad) == (7, 2, 5)
    assert report.reasons == {
        "field chosen is missing": 1,
        "field prompt is empty": 1,
        "field chosen is int, not text": 1,
        "not JSON": 1,
        "chosen and rejected are equal": 1,
    }
    assert report.first_problem.endswith("rows.jsonl row 2: field chosen is missing")
    assert f"{tmp_path / 'in' / 'rows.jsonl'} row 6: chosen and rejected are equal" in caplog.text
    assert "5 of 7 records are unusable" in caplog.text


def test_only_the_first_bad_rows_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        convert(tmp_path, [{"prompt": "x"}] * 50, format="common")
    assert caplog.text.count("unusable record:") == 5
    assert "50 x field chosen is missing" in caplog.text


def test_too_many_bad_rows_stop_with_the_first_one(tmp_path: Path) -> None:
    source, folder = convert(tmp_path, [*pairs(20), {"prompt": "x"}])
    reports = read_reports(folder)
    check_reports(source, reports, max_bad_share=0.05)
    with pytest.raises(DataError, match=r"1 of 21 records .* row 21: field chosen") as caught:
        check_reports(source, reports, max_bad_share=0.04)
    assert "\n" not in str(caught.value)


def test_source_without_rows_stops(tmp_path: Path) -> None:
    source, folder = convert(tmp_path, [])
    with pytest.raises(DataError, match="no rows: 0 records"):
        check_reports(source, read_reports(folder), max_bad_share=1.0)


def test_records_without_an_answer_are_not_bad(tmp_path: Path) -> None:
    unanswered = {"queries": {"ja": "why?"}, "answers": {"ja": [{"text": None}]}}
    answered = {"queries": {"ja": "why?"}, "answers": {"ja": [{"text": "so"}]}}
    _, folder = convert(tmp_path, [unanswered, answered], format="mkqa-Japanese")
    report = read_reports(folder)["train"]
    assert (report.records, report.rows, report.unanswered, report.bad) == (2, 1, 1, 0)
    assert report.serving == {"sft": 1, "reward": 0, "prompts": 1}


def test_max_rows_limits_what_is_read(tmp_path: Path) -> None:
    _, folder = convert(tmp_path, pairs(30), max_rows=12)
    assert read_reports(folder)["train"].records == 12

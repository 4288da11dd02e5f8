import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megachat.data import records_io
from megachat.data.records_io import RawRecord, read_dataset, read_file
from megachat.errors import DataError
from tests.data.samples import pairs, write_jsonl

ROWS: list[dict[str, Any]] = [
    *pairs(3),
    {"prompt": 'a "quoted" line\n', "chosen": "\u96e8\U0001f327"},
]


def values(path: Path) -> list[Any]:
    return [record.value for record in read_file(path)]


def test_jsonl_json_and_parquet_give_the_same_records(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "lines.json", ROWS)
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "lines.json", "array.json"):
        assert values(tmp_path / name) == ROWS
    assert values(tmp_path / "a.parquet") == [{"rejected": None} | row for row in ROWS]


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9) | st.floats(0, 1))),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
)
def test_array_is_read_across_block_borders(
    rows: list[Any],
    indent: int | None,
    ascii_only: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With blocks of 5 bytes, borders fall inside keys, numbers and UTF-8 characters."""
    monkeypatch.setattr(records_io, "_BLOCK_BYTES", 5)
    path = tmp_path / "array.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert values(path) == rows


@pytest.mark.parametrize("as_array", [True, False])
def test_byte_order_mark_is_passed_over(tmp_path: Path, as_array: bool) -> None:
    text = json.dumps(ROWS) if as_array else "\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "a.json").write_text(text, encoding="utf-8-sig")
    assert values(tmp_path / "a.json") == ROWS


def test_broken_lines_are_records_with_a_reason(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "x"}, "{broken", "", "[1]", {"prompt": "y"}]
    )
    first, broken, number, last = read_file(path)
    assert (first.row, first.value) == (1, {"prompt": "x"})
    assert (broken.row, broken.value) == (2, None)
    assert broken.problem is not None and broken.problem.startswith("not JSON: ")
    assert (number.row, number.problem) == (4, "the record is list, not an object")
    assert (last.row, last.value) == (5, {"prompt": "y"})


def test_lines_that_are_not_utf8_are_records_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "\xff\xfe"}\n{"prompt": "x"}\n')
    first, second = read_file(path)
    assert first.value is None and first.problem is not None
    assert second.value == {"prompt": "x"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'[{"a": 1}', "after item 1, not"),
        (b'[{"a": 1} {"a": 2}]', "after item 1, not"),
        (b'[{"a": 1}, {"a": ', "item 2 cannot be read"),
        (b'[{"a": "\xff"}]', "not UTF-8"),
    ],
)
def test_broken_array_stops_with_one_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "array.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=complaint) as caught:
        values(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_empty_files_have_no_records(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", ""), ("b.json", ""), ("c.json", " [ ] ")):
        (tmp_path / name).write_text(content)
        assert values(tmp_path / name) == []


def test_broken_parquet_stops_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"this is not a Parquet file at all")
    with pytest.raises(DataError, match="not a readable Parquet file") as caught:
        values(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_unknown_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        values(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"cannot read '\.csv' files"):
        values(tmp_path / "a.csv")


def test_dataset_rows_are_numbered_from_one() -> None:
    dataset = datasets.Dataset.from_list([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}])
    assert list(read_dataset(dataset, name="d")) == [
        RawRecord(file="d", row=1, value={"a": 1, "b": "x"}),
        RawRecord(file="d", row=2, value={"a": 2, "b": "y"}),
    ]

import csv
import gzip
import json
from collections.abc import Callable
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
    with pytest.raises(DataError, match=r"cannot read '\.xlsx' files"):
        values(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match=r"cannot read '\.gz' files"):
        values(tmp_path / "a.parquet.gz")


def test_dataset_rows_are_numbered_from_one() -> None:
    dataset = datasets.Dataset.from_list([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}])
    assert list(read_dataset(dataset, name="d")) == [
        RawRecord(file="d", row=1, value={"a": 1, "b": "x"}),
        RawRecord(file="d", row=2, value={"a": 2, "b": "y"}),
    ]


DEEP = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"
"""A record that no recursive reader survives."""


def test_a_line_nested_too_deeply_is_a_record_with_a_reason(tmp_path: Path) -> None:
    first, second = read_file(write_jsonl(tmp_path / "a.jsonl", [DEEP, {"prompt": "x"}]))
    assert (first.row, first.value, first.problem) == (1, None, "nested too deeply")
    assert second.value == {"prompt": "x"}


def test_an_array_with_an_item_nested_too_deeply_stops_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f'[{{"a": 1}}, {DEEP}]')
    with pytest.raises(DataError, match="item 2 of the array is nested too deeply") as caught:
        values(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_compressed_files_give_what_plain_ones_give(tmp_path: Path) -> None:
    for name in ("a.jsonl", "array.json"):
        plain = tmp_path / name
        plain.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
        assert values(tmp_path / f"{name}.gz") == values(plain) == ROWS


@pytest.mark.parametrize("spoil", [lambda data: data[:-20], lambda data: data[:300] + data[320:]])
def test_a_damaged_gzip_file_stops_with_one_line(
    tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    text = "".join(json.dumps(row) + "\n" for row in pairs(4000))
    (tmp_path / "a.jsonl.gz").write_bytes(spoil(gzip.compress(text.encode())))
    with pytest.raises(
        DataError, match=r"a\.jsonl\.gz: not a whole gzip file: .* row \d+"
    ) as caught:
        values(tmp_path / "a.jsonl.gz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("b.csv", ";"), ("c.tsv", "\t")])
def test_tables_of_text_are_records_by_their_first_line(
    tmp_path: Path, name: str, mark: str
) -> None:
    rows = [{"prompt": 'say "hi", twice', "chosen": "hi;\nhi\u2028"}, {"prompt": "x", "chosen": ""}]
    with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen"], delimiter=mark)
        writer.writeheader()
        writer.writerows(rows)
    assert values(tmp_path / name) == rows


def test_broken_rows_of_a_table_are_records_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,2\n1\n1,2,3\n\xff,2\n")
    whole, short, long, bytes_row = read_file(tmp_path / "a.csv")
    assert whole.value == {"a": "1", "b": "2"}
    assert [(record.row, record.problem) for record in (short, long)] == [
        (2, "not as many cells as the 2 named columns"),
        (3, "not as many cells as the 2 named columns"),
    ]
    assert bytes_row.value == {"a": "\udcff", "b": "2"}  # what makes a row of it, refuses it


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match="two columns have one name"):
        values(tmp_path / "a.csv")


@settings(
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    content=st.lists(
        st.binary(max_size=12)
        | st.sampled_from(
            [
                b"{",
                b"}",
                b'"',
                b"[",
                b"]",
                b",",
                b"\n",
                b'{"a": 1}\n',
                b"\x00",
                b"\xed\xa0\xbd",
                b"1e999",
            ]
        ),
        max_size=12,
    ),
    kind=st.sampled_from(["json", "jsonl", "csv", "tsv", "parquet", "jsonl.gz", "csv.gz"]),
    compress=st.booleans(),
)
def test_any_bytes_give_records_or_one_line(
    content: list[bytes], kind: str, compress: bool, tmp_path: Path
) -> None:
    data = b"".join(content)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(gzip.compress(data) if compress else data)
    try:
        records = list(read_file(path))
    except DataError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert all((record.value is None) == (record.problem is not None) for record in records)

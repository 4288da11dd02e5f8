from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megachat.data.arrow import INT64, TEXT, TOKENS, open_arrow, read_parquet, write_arrow
from megachat.errors import DataError

COLUMNS = {"id": INT64, "text": TEXT, "tokens": TOKENS}


def blocks() -> Iterator[dict[str, list[Any]]]:
    yield {"id": [1, 2], "text": ["a", None], "tokens": [[1, 2], []]}
    yield {"id": [], "text": [], "tokens": []}
    yield {"id": [3], "text": ["c"], "tokens": [[3]]}


def test_blocks_come_back_as_rows(tmp_path: Path) -> None:
    assert write_arrow(tmp_path / "a.arrow", COLUMNS, blocks()) == 3
    table = open_arrow(tmp_path / "a.arrow")
    assert len(table) == 3
    assert table[1] == {"id": 2, "text": None, "tokens": []}
    assert table[2] == {"id": 3, "text": "c", "tokens": [3]}


def test_opened_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    write_arrow(tmp_path / "a.arrow", COLUMNS, blocks())
    table = open_arrow(tmp_path / "a.arrow")
    assert [file["filename"] for file in table.cache_files] == [str(tmp_path / "a.arrow")]


def test_file_without_rows_opens(tmp_path: Path) -> None:
    assert write_arrow(tmp_path / "a.arrow", COLUMNS, iter([])) == 0
    assert len(open_arrow(tmp_path / "a.arrow")) == 0


def test_damaged_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(b"nothing of use in here")
    with pytest.raises(DataError, match="delete .* to build it again") as caught:
        open_arrow(tmp_path / "a.arrow")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        open_arrow(tmp_path / "missing.arrow")


def test_damaged_parquet_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file after row 0"):
        list(read_parquet(tmp_path / "a.parquet"))

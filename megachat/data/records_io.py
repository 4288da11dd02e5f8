"""Streams raw records out of files, each with its file and row number.

Nothing here holds more than one block of a file in memory. A broken line of a JSONL or CSV file is
a record with a `problem`, so that it can be counted; a file that is broken as a whole is a
`DataError`.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megachat.data.arrow import ROWS_AT_ONCE, read_parquet
from megachat.data.messages import first_line
from megachat.errors import DataError

_BLOCK_BYTES = 1 << 20
_MAX_ITEM_BYTES = 64 << 20

PARQUET_SUFFIX = ".parquet"
TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
"""Kinds of text files that can be read, also with `.gz` behind; a .json file holds one array, or
one object per line, and the first line of a .csv or .tsv file names the columns."""
FILE_SUFFIXES = (*TEXT_SUFFIXES, PARQUET_SUFFIX)
"""Kinds of files that can be read."""

_COMPRESSED = ".gz"
_DELIMITERS = ",;\t"
"""What may stand between the cells of a .csv file; the one that its first line has most of does."""
_SURPLUS = "\0surplus"
"""Where the csv module puts cells beyond the last named column; no header has such a name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRecord:
    """One record as a source has it."""

    file: str
    """File or data set it comes from."""
    row: int
    """Its place there: the line of a JSONL file, else the number of the record, from 1."""
    value: Mapping[str, Any] | None
    """The fields; None where it could not be read."""
    problem: str | None = None
    """Why it could not be read."""


def is_data_file(path: Path) -> bool:
    """Whether `read_file` reads files of such a name."""
    compressed = path.suffix.lower() == _COMPRESSED
    return file_kind(path) in (TEXT_SUFFIXES if compressed else FILE_SUFFIXES)


def file_kind(path: Path) -> str:
    """The suffix that says how a file is read: `.jsonl` of `a.JSONL` and of `a.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [_COMPRESSED]:
        del suffixes[-1]
    return suffixes[-1] if suffixes else ""


def read_file(path: Path) -> Iterator[RawRecord]:
    """Streams the records of a file of one of the `FILE_SUFFIXES`.

    Raises:
        DataError: The file is missing, of another kind, or broken as a whole.
    """
    if not is_data_file(path):
        raise DataError(
            f"{path}: cannot read '{path.suffix}' files, only {', '.join(FILE_SUFFIXES)} (text "
            f"also with {_COMPRESSED})"
        )
    row = 0
    try:
        for record in _read(path):
            yield record
            row = record.row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: not a whole gzip file: it breaks off after row {row}: {first_line(error)}"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read(path: Path) -> Iterator[RawRecord]:
    kind = file_kind(path)
    if kind == PARQUET_SUFFIX:
        yield from _read_parquet(path)
        return
    compressed = path.suffix.lower() == _COMPRESSED
    opened = gzip.open(path, "rb") if compressed else path.open("rb")
    with opened as stream:
        file: BinaryIO = stream  # type: ignore[assignment]  # a GzipFile reads like any other
        is_array = kind == ".json" and _first_byte(file) == b"["
        file.seek(len(codecs.BOM_UTF8) if _starts_with_mark(file) else 0)
        read: Callable[[Path, BinaryIO], Iterator[RawRecord]] = _read_json_lines
        if kind in (".csv", ".tsv"):
            read = _read_csv
        elif is_array:
            read = _read_json_array
        yield from read(path, file)


def read_dataset(dataset: Any, *, name: str) -> Iterator[RawRecord]:
    """Streams the rows of a `datasets.Dataset`, which lies memory-mapped on disk."""
    row = 0
    for columns in dataset.iter(batch_size=ROWS_AT_ONCE):
        for values in zip(*columns.values(), strict=True):
            row += 1
            yield RawRecord(file=name, row=row, value=dict(zip(columns, values, strict=True)))


def _read_parquet(path: Path) -> Iterator[RawRecord]:
    for row, value in enumerate(read_parquet(path), start=1):
        yield RawRecord(file=str(path), row=row, value=value)


def _read_json_lines(path: Path, file: BinaryIO) -> Iterator[RawRecord]:
    """One object per line; blank lines are passed over."""
    for row, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except RecursionError:
            yield _broken(path, row, "nested too deeply")
        except ValueError as error:  # not UTF-8, or not JSON
            yield _broken(path, row, f"not JSON: {first_line(error)}")
        else:
            yield _record(path, row, value)


def _read_csv(path: Path, file: BinaryIO) -> Iterator[RawRecord]:
    """A line of column names, then rows of as many cells; blank lines are passed over.

    Bytes that are not UTF-8 become characters that no row may hold (`errors="surrogateescape"`), so
    that they cost one row and not the file.
    """
    csv.field_size_limit(_MAX_ITEM_BYTES)
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    head = text.readline()
    delimiter = max(_DELIMITERS, key=head.count) if file_kind(path) == ".csv" else "\t"
    names = next(csv.reader([head], delimiter=delimiter), [])
    if len(set(names)) < len(names):
        raise DataError(f"{path}: two columns have one name: {', '.join(map(ascii, names))}")
    cells = csv.DictReader(text, names, delimiter=delimiter, restkey=_SURPLUS)
    row = 0
    while True:
        row += 1
        try:
            value = next(cells)
        except StopIteration:
            text.detach()  # who opened the file closes it
            return
        except csv.Error as error:
            yield _broken(path, row, f"not CSV: {first_line(error)}")
            continue
        if _SURPLUS in value or None in value.values():
            yield _broken(path, row, f"not as many cells as the {len(names)} named columns")
        else:
            yield _record(path, row, value)


def _read_json_array(path: Path, file: BinaryIO) -> Iterator[RawRecord]:
    """The items of one big array, decoded from a sliding window over the file."""
    window = _TextWindow(path, file)
    window.expect("[")
    row = 0
    if window.peek() == "]":
        return
    while True:
        row += 1
        yield _record(path, row, window.next_value(row))
        mark = window.peek()
        if mark == "]":
            return
        if mark != ",":
            raise DataError(f"{path}: not a JSON array: {mark!r} after item {row}, not ',' or ']'")
        window.expect(",")


class _TextWindow:
    """The not yet consumed part of a UTF-8 file, refilled block by block."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._start = 0
        self._rest = b""
        self._ended = False

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            while self._start < len(self._text) and self._text[self._start].isspace():
                self._start += 1
            if self._start < len(self._text) or not self._refill():
                return self._text[self._start : self._start + 1]

    def expect(self, character: str) -> None:
        """Consumes one character that `peek` has to find."""
        if self.peek() != character:
            raise DataError(f"{self._path}: not a JSON array: '{character}' expected")
        self._start += 1

    def next_value(self, row: int) -> Any:
        """Decodes the next item, reading on until it is complete."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._start)
            except RecursionError as error:
                raise DataError(
                    f"{self._path}: item {row} of the array is nested too deeply"
                ) from error
            except ValueError as error:
                too_big = len(self._text) - self._start > _MAX_ITEM_BYTES
                if too_big or not self._refill():
                    raise DataError(
                        f"{self._path}: not a JSON array: item {row} cannot be read: "
                        f"{first_line(error)}"
                    ) from error
                continue
            if end < len(self._text) or not self._refill():
                self._start = end
                return value
            # The item touches the end of the window: a number could go on in the next block.

    def _refill(self) -> bool:
        """Drops what is consumed and appends a block; False at the end of the file."""
        if self._ended:
            return False
        block = self._file.read(max(_BLOCK_BYTES, len(self._text) - self._start))
        self._ended = not block
        data = self._rest + block
        try:
            text = data.decode("utf-8")
            self._rest = b""
        except UnicodeDecodeError as error:
            if self._ended or len(data) - error.start >= 4:
                raise DataError(f"{self._path}: not UTF-8 text: {first_line(error)}") from error
            text = data[: error.start].decode("utf-8")
            self._rest = data[error.start :]
        self._text = self._text[self._start :] + text
        self._start = 0
        return bool(text)


def _record(path: Path, row: int, value: Any) -> RawRecord:
    if isinstance(value, dict):
        return RawRecord(file=str(path), row=row, value=value)
    return _broken(path, row, f"the record is {type(value).__name__}, not an object")


def _broken(path: Path, row: int, problem: str) -> RawRecord:
    return RawRecord(file=str(path), row=row, value=None, problem=problem)


def _first_byte(file: BinaryIO) -> bytes:
    """The first byte that is neither white space nor a byte order mark."""
    while block := file.read(4096):
        if text := block.removeprefix(codecs.BOM_UTF8).strip():
            return text[:1]
    return b""


def _starts_with_mark(file: BinaryIO) -> bool:
    """Whether a file starts with a byte order mark, as some editors write it."""
    file.seek(0)
    return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8

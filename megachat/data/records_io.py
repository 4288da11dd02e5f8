"""The one place that streams raw records out of files, each with its file and row number.

Nothing here holds more than one block of a file in memory. A broken line of a JSONL file is a
record with a `problem`, so that it can be counted; a file that is broken as a whole is a
`DataError`.
"""

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megachat.data.arrow import ROWS_AT_ONCE, read_parquet
from megachat.data.messages import first_line
from megachat.errors import DataError

_BLOCK_BYTES = 1 << 20
_MAX_ITEM_BYTES = 64 << 20

FILE_SUFFIXES = (".json", ".jsonl", ".parquet")
"""Kinds of files that can be read; a .json file holds one array, or one object per line."""


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


def read_file(path: Path) -> Iterator[RawRecord]:
    """Streams the records of a .json, .jsonl or .parquet file.

    Raises:
        DataError: The file is missing, of another kind, or broken as a whole.
    """
    if path.suffix not in FILE_SUFFIXES:
        raise DataError(
            f"{path}: cannot read '{path.suffix}' files, only {', '.join(FILE_SUFFIXES)}"
        )
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
            return
        with path.open("rb") as file:
            is_array = path.suffix == ".json" and _first_byte(file) == b"["
            file.seek(len(codecs.BOM_UTF8) if _starts_with_mark(file) else 0)
            yield from (_read_json_array if is_array else _read_json_lines)(path, file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


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
        except ValueError as error:  # not UTF-8, or not JSON
            yield RawRecord(
                file=str(path), row=row, value=None, problem=f"not JSON: {first_line(error)}"
            )
            continue
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
    problem = f"the record is {type(value).__name__}, not an object"
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

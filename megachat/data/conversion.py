"""Turns raw records into common rows on disk, and counts the bad ones.

Rows are streamed into Arrow files in blocks, so a source of any size needs the memory of one block.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from megachat.data.arrow import ROWS_AT_ONCE, TEXT, write_arrow
from megachat.data.chat import ChatConfig
from megachat.data.config import SourceConfig, Stage
from megachat.data.formats import FORMATS, Row, RowError, RowFunction
from megachat.data.own_formats import (
    OWN_FORMATS,
    OwnFormat,
    Rendering,
    find_format,
    rename_columns,
)
from megachat.data.records_io import RawRecord
from megachat.data.sources import TRAIN, OpenSource, Records
from megachat.errors import DataError

_LOG = logging.getLogger(__name__)

ROWS_VERSION = 2
"""Part of the cache key of converted rows; raised when a conversion changes."""

ROW_COLUMNS = {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}
"""The common row on disk; an answer is null where there is none."""

_LOGGED_PROBLEMS = 5
_REPORT_FILE = "rows.json"


@dataclass(kw_only=True, slots=True)
class ConversionReport:
    """What became of the records of one split of a source."""

    records: int = 0
    """Raw records read."""
    rows: int = 0
    """Common rows written."""
    unanswered: int = 0
    """Sound records without an answer."""
    bad: int = 0
    """Records that could not be used."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Bad records by reason."""
    first_problem: str = ""
    """File, row and reason of the first bad record."""
    format: str = ""
    """Name of the format of the rows."""
    found: str = ""
    """Why this format was taken, where the rows themselves said it."""
    serving: dict[str, int] = field(default_factory=dict)
    """Rows that can serve each step, by its name."""

    def take(self, record: RawRecord, read: RowFunction) -> Sequence[Row]:
        """Counts a record and gives its rows.

        Raises:
            RowError: It cannot be used; that is counted, too.
        """
        self.records += 1
        try:
            if record.value is None:
                raise RowError(record.problem or "unreadable")
            rows = read(record.value)
        except RowError as problem:
            if not self.bad:
                self.first_problem = f"{record.file} row {record.row}: {problem}"
            self.bad += 1
            raise
        self.rows += len(rows)
        self.unanswered += not rows
        for row in rows:
            for stage in row.stages:
                self.serving[stage.value] += 1
        return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How the records of a source are read."""

    rows: RowFunction
    format: str
    found: str
    """Why this format was taken, where the rows themselves said it."""

    def report(self) -> ConversionReport:
        """One that counts nothing yet."""
        serving = {stage.value: 0 for stage in Stage}
        return ConversionReport(format=self.format, found=self.found, serving=serving)


def convert_source(
    source: SourceConfig, opened: OpenSource, folder: Path, *, chat: ChatConfig
) -> None:
    """Writes one Arrow file per split of a source and a report beside them.

    Args:
        source: The settings of the source.
        opened: Its records.
        folder: Where to write.
        chat: What stands before the turns of conversations.

    Raises:
        DataError: A file is broken as a whole, or its rows are of no known format.
    """
    reading = reading_of(source, opened.splits[TRAIN], chat=chat)
    reports = {}
    for split, read in opened.splits.items():
        converter = _Converter(source=source, reading=reading)
        write_arrow(folder / f"{split}.arrow", ROW_COLUMNS, converter.blocks(read()))
        converter.log(split)
        reports[split] = asdict(converter.report)
    (folder / _REPORT_FILE).write_text(json.dumps(reports, allow_nan=False))


def reading_of(source: SourceConfig, records: Records, *, chat: ChatConfig) -> Reading:
    """The rules for the records of a source: those of its format, given or found.

    Raises:
        DataError: The first records are of no known format.
    """
    name, found = source.format_name, ""
    if name is not None and name in FORMATS:
        return Reading(rows=FORMATS[name].rows, format=name, found=found)
    columns = source.columns.names
    if name is None:
        look = find_format(_renamed(records(), columns), source=str(source.path))
        name, found = look.name, look.reason
    style = Rendering(chat=chat, render=source.render)
    rows = partial(_own_rows, columns=columns, known=OWN_FORMATS[name], style=style)
    return Reading(rows=rows, format=name, found=found)


def _renamed(records: Iterator[RawRecord], columns: Mapping[str, str]) -> Iterator[RawRecord]:
    """The records under the names that formats know; one that lacks a named field has none.

    Raises:
        DataError: The first record lacks a named field, so that the name must be wrong.
    """
    for place, record in enumerate(records):
        try:
            value = None if record.value is None else rename_columns(record.value, columns)
        except RowError as error:
            if place == 0:
                there = ", ".join(ascii(str(name))[1:-1] for name in record.value or ())
                raise DataError(
                    f"{record.file} row {record.row}: {error}, which columns names; there are "
                    f"{there}"
                ) from error
            value = None
        yield replace(record, value=value)


def _own_rows(
    record: Mapping[str, Any], *, columns: Mapping[str, str], known: OwnFormat, style: Rendering
) -> Sequence[Row]:
    return known.rows(rename_columns(record, columns), style)


def check_reports(
    source: SourceConfig, reports: Mapping[str, ConversionReport], *, max_bad_share: float
) -> None:
    """Refuses a source that has too many bad records, or no training rows at all.

    Raises:
        DataError: With the numbers and the first bad record.
    """
    for split, report in reports.items():
        place = f" ({source.path})" if source.path is not None else ""
        name = f"data set {source.name} [{split}]{place}"
        if report.bad > max_bad_share * report.records:
            raise DataError(
                f"{name}: {report.bad} of {report.records} records are unusable, more than "
                f"max_bad_share {max_bad_share:g} allows; the first is {report.first_problem} "
                f"(expected the fields of '{report.format}')"
            )
        if split == TRAIN and not report.rows:
            raise DataError(
                f"{name}: no rows: {report.records} records, {report.unanswered} of them without "
                f"an answer, {report.bad} unusable"
            )


def read_reports(folder: Path) -> Mapping[str, ConversionReport]:
    """The reports that `convert_source` wrote, by split."""
    stored = json.loads((folder / _REPORT_FILE).read_text())
    return {split: ConversionReport(**report) for split, report in stored.items()}


class _Converter:
    """One pass over the records of a split."""

    def __init__(self, *, source: SourceConfig, reading: Reading) -> None:
        self.report = reading.report()
        self._source = source
        self._rows = reading.rows
        self._reasons: Counter[str] = Counter()

    def blocks(self, records: Iterator[RawRecord]) -> Iterator[dict[str, list[Any]]]:
        """Columns of up to `ROWS_AT_ONCE` records."""
        limited = islice(records, self._source.max_rows)
        while block := list(islice(limited, ROWS_AT_ONCE)):
            rows = [row for record in block for row in self._convert(record)]
            yield {
                "prompt": [row.prompt for row in rows],
                "chosen": [row.chosen for row in rows],
                "rejected": [row.rejected for row in rows],
            }

    def log(self, split: str) -> None:
        """Says what was left out."""
        report = self.report
        report.reasons = dict(self._reasons.most_common())
        _LOG.info(
            "data set %s [%s]: %d rows of format %s%s, of use to %s",
            self._source.name,
            split,
            report.rows,
            report.format,
            f" ({report.found})" if report.found else "",
            ", ".join(stage for stage, rows in report.serving.items() if rows) or "no step",
        )
        if report.bad:
            _LOG.warning(
                "data set %s [%s]: %d of %d records are unusable: %s",
                self._source.name,
                split,
                report.bad,
                report.records,
                ", ".join(f"{count} x {reason}" for reason, count in report.reasons.items()),
            )

    def _convert(self, record: RawRecord) -> Sequence[Row]:
        try:
            return self.report.take(record, self._rows)
        except RowError as problem:
            if self.report.bad <= _LOGGED_PROBLEMS:
                _LOG.warning("unusable record: %s row %s: %s", record.file, record.row, problem)
            self._reasons[str(problem).partition(": ")[0]] += 1
            return ()

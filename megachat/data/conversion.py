"""The one place where raw records become common rows on disk, and bad ones are counted.

Rows are streamed into Arrow files in blocks, so a source of any size needs the memory of one block.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megachat.data.arrow import ROWS_AT_ONCE, TEXT, write_arrow
from megachat.data.config import SourceConfig
from megachat.data.formats import FORMATS, Row, RowError, RowFunction
from megachat.data.records_io import RawRecord
from megachat.data.sources import TRAIN, OpenSource
from megachat.errors import DataError

_LOG = logging.getLogger(__name__)

ROWS_VERSION = 1
"""Part of the cache key of converted rows; raised when a conversion changes."""

ROW_COLUMNS = {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}
"""The common row on disk; `rejected` is null where there is none."""

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


def convert_source(source: SourceConfig, opened: OpenSource, folder: Path) -> None:
    """Writes one Arrow file per split of a source and a report beside them.

    Raises:
        DataError: A file is broken as a whole.
    """
    reports = {}
    for split, read in opened.splits.items():
        converter = _Converter(source=source, rows=FORMATS[source.format_name].rows)
        write_arrow(folder / f"{split}.arrow", ROW_COLUMNS, converter.blocks(read()))
        converter.log(split)
        reports[split] = asdict(converter.report)
    (folder / _REPORT_FILE).write_text(json.dumps(reports, allow_nan=False))


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
                f"(expected the fields of '{source.format_name}')"
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

    def __init__(self, *, source: SourceConfig, rows: RowFunction) -> None:
        self.report = ConversionReport()
        self._source = source
        self._rows = rows
        self._reasons: Counter[str] = Counter()

    def blocks(self, records: Iterator[RawRecord]) -> Iterator[dict[str, list[Any]]]:
        """Columns of up to `ROWS_AT_ONCE` records."""
        limited = islice(records, self._source.max_rows)
        while block := list(islice(limited, ROWS_AT_ONCE)):
            rows = [row for record in block for row in self._convert(record)]
            self.report.rows += len(rows)
            yield {
                "prompt": [row.prompt for row in rows],
                "chosen": [row.chosen for row in rows],
                "rejected": [row.rejected for row in rows],
            }

    def log(self, split: str) -> None:
        """Says what was left out."""
        report = self.report
        report.reasons = dict(self._reasons.most_common())
        if report.bad:
            _LOG.warning(
                "data set %s [%s]: %d of %d records are unusable: %s",
                self._source.name,
                split,
                report.bad,
                report.records,
                ", ".join(f"{count} x {reason}" for reason, count in report.reasons.items()),
            )

    def _convert(self, record: RawRecord) -> list[Row]:
        self.report.records += 1
        try:
            if record.value is None:
                raise RowError(record.problem or "unreadable")
            rows = list(self._rows(record.value))
        except RowError as problem:
            self._count_bad(record, str(problem))
            return []
        self.report.unanswered += not rows
        return rows

    def _count_bad(self, record: RawRecord, reason: str) -> None:
        where = f"{record.file} row {record.row}: {reason}"
        if not self.report.bad:
            self.report.first_problem = where
        if self.report.bad < _LOGGED_PROBLEMS:
            _LOG.warning("unusable record: %s", where)
        self.report.bad += 1
        self._reasons[reason.partition(": ")[0]] += 1

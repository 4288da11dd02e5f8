"""Counts what the first records of local sources give, without keeping, hashing or writing any.

The counts are those of the conversion, so a source that is read to its end is judged as the run
judges it. What the tokenizer's length limits drop is not known here: rows are upper bounds.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import numpy as np

from megachat.data.blending import Indices, Part, hold_out, stage_part
from megachat.data.chat import ChatConfig
from megachat.data.config import DataConfig, SourceConfig, Stage
from megachat.data.conversion import ConversionReport, Reading, check_reports, reading_of
from megachat.data.formats import RowError
from megachat.data.records_io import RawRecord
from megachat.data.sources import TRAIN, VALIDATION, Records, local_records
from megachat.data.stage_data import shares_of
from megachat.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCounts:
    """Rows that a stage has at most."""

    train: int
    """Of an epoch, by the weights of the sources."""
    held_out: int


@dataclass(kw_only=True, slots=True)
class _Split:
    """One pass over the records of a split."""

    records: Iterator[RawRecord]
    report: ConversionReport
    is_complete: bool = False
    """Whether the pass has come to the end."""


class SourceLook:
    """A local source, read as far as was asked for."""

    def __init__(self, source: SourceConfig, *, chat: ChatConfig) -> None:
        """Opens it and reads the records that show its format.

        Args:
            source: Its settings.
            chat: What stands before the turns of conversations.

        Raises:
            DataError: It is not there, holds no data, or is of no known format.
        """
        if source.path is None:
            raise DataError(f"data set {source.name}: only a source with a path is local")
        self.source = source
        found: Mapping[str, Records] = local_records(source.path)
        reading: Reading = reading_of(source, found[TRAIN], chat=chat)
        self._rows = reading.rows
        self._splits = {
            name: _Split(records=islice(records(), source.max_rows), report=reading.report())
            for name, records in found.items()
        }

    @property
    def is_complete(self) -> bool:
        """Whether everything has been read."""
        return all(split.is_complete for split in self._splits.values())

    @property
    def unusable(self) -> int:
        """Training records that were read, where none of them could be used; else 0."""
        report = self._splits[TRAIN].report
        return 0 if report.rows else report.records

    def read(self, count: int) -> None:
        """Reads so many more records of each split, or what is left.

        Raises:
            DataError: A file cannot be read or is broken as a whole.
        """
        for split in self._splits.values():
            before = split.report.records
            for record in islice(split.records, count):
                with suppress(RowError):  # the report counts it
                    split.report.take(record, self._rows)
            split.is_complete = split.report.records < before + count

    def check(self, *, max_bad_share: float) -> None:
        """Judges splits that were read to their end as the conversion does.

        Raises:
            DataError: Too many records are unusable, or there are no rows.
        """
        reports = {name: split.report for name, split in self._splits.items() if split.is_complete}
        check_reports(self.source, reports, max_bad_share=max_bad_share)

    def counts(self, config: DataConfig, stage: Stage) -> RowCounts:
        """What the rows that were read give to a stage.

        Raises:
            DataError: The source's own split gives rows to steps that none of them can serve.
        """
        served = self._splits[TRAIN].report.serving
        if not any(served.values()):
            return RowCounts(train=0, held_out=0)
        parts = {name: self._part(name, config, stage) for name in self._splits}
        if VALIDATION in parts:
            train, held_out = (
                len(parts[TRAIN]),
                len(parts[VALIDATION][: config.max_validation_rows]),
            )
        else:
            held = hold_out(
                parts[TRAIN], share=config.validation_share, at_most=config.max_validation_rows
            )
            train, held_out = len(held.train), len(held.validation)
        if stage is Stage.REWARD:  # rows without a pair are left out of its part
            pairs = {
                name: split.report.serving[stage.value] for name, split in self._splits.items()
            }
            train = min(train, pairs[TRAIN])
            held_out = min(held_out, pairs.get(VALIDATION, pairs[TRAIN]))
        part = Part(source=self.source.name, num_rows=train, weight=self.source.weight)
        return RowCounts(train=part.rows_per_epoch, held_out=held_out)

    def _part(self, split: str, config: DataConfig, stage: Stage) -> Indices:
        """As many row numbers as the stage gets of a split; which ones does not matter."""
        return stage_part(
            self._splits[split].report.rows,
            weights=shares_of(self.source, config, serving=self._splits[TRAIN].report.serving),
            part=list(Stage).index(stage),
            random=np.random.default_rng(0),
        )

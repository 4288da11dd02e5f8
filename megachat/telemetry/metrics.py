"""The one place that writes and reads the numbers of a run: `open_metrics`, `read_metrics`.

Metrics are named `group/name` (`rlhf/kl`, `perf/generate_tokens_per_s`) and go to two files of the
stage's folder: `metrics.jsonl`, the record that reports and tests read, and TensorBoard events.
Only rank 0 writes; the other ranks get a sink that does nothing, so that callers never ask who
they are.
"""

import json
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from torch.utils.tensorboard import SummaryWriter

from megachat.errors import ConfigError, DataError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
NAME_PATTERN = re.compile(r"[A-Za-z0-9_.]+(/[A-Za-z0-9_.]+)+")

logger = logging.getLogger(__name__)


class MetricsSink(Protocol):
    """Where a stage sends its numbers."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of one step; names are `group/name`."""

    def close(self) -> None:
        """Ends the recording."""


class _ContextSink:
    """Lets a sink be used in a `with` statement."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the recording."""


class NullMetricsWriter(_ContextSink):
    """The sink of the ranks that do not write."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Checks the names as the real writer does, and records nothing."""
        _check_names(metrics)


class MetricsWriter(_ContextSink):
    """Appends each step to `metrics.jsonl` and to TensorBoard events, on disk when `write` returns.

    One JSON object a line: `{"step": 3, "time": 1755800000.0, "metrics": {"rlhf/kl": 0.01}}`.
    JSON knows no NaN or infinity; such values are written as the strings "NaN", "Infinity" and
    "-Infinity", and `read_metrics` turns them back. A writer opened on a folder that already has
    metrics continues it; a line cut short by a crash is removed first.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the files.

        Args:
            folder: The stage's folder, made if missing.

        Raises:
            ConfigError: The folder cannot be made or written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_torn_line(folder / METRICS_FILE)
            self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{folder}: cannot write metrics here: {error.strerror}") from error
        self._events = SummaryWriter(log_dir=str(folder / TENSORBOARD_FOLDER))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of one step.

        Args:
            step: Number of the step, counted from the start of the stage.
            metrics: Values by `group/name`; NaN and infinities are allowed.

        Raises:
            ValueError: A name is not of the form `group/name`.
        """
        _check_names(metrics)
        values = {name: float(value) for name, value in metrics.items()}
        line = {
            "step": step,
            "time": time.time(),
            "metrics": {name: _encode(value) for name, value in values.items()},
        }
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._events.close()


def open_metrics(folder: Path, *, rank: int) -> MetricsWriter | NullMetricsWriter:
    """The sink of one rank: a writer on rank 0, one that records nothing elsewhere."""
    return MetricsWriter(folder) if rank == 0 else NullMetricsWriter()


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsRow:
    """One line of `metrics.jsonl`."""

    step: int
    time: float
    """Seconds since the epoch at which the line was written."""
    values: Mapping[str, float]
    """By metric name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsHistory:
    """Everything a stage recorded, in the order of writing."""

    rows: Sequence[MetricsRow]

    @property
    def names(self) -> list[str]:
        """All metric names, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values))

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric by rising step; of a repeated step the last value counts.

        A step is repeated where a run was resumed from a checkpoint older than its last line.
        """
        return sorted(
            {row.step: row.values[name] for row in self.rows if name in row.values}.items()
        )

    def last(self, name: str) -> float | None:
        """The value of the highest step, None where the metric was never recorded."""
        series = self.series(name)
        return series[-1][1] if series else None


def read_metrics(folder: Path) -> MetricsHistory:
    """Reads the metrics of a stage; a folder without any gives an empty history.

    A last line without a line end is skipped: its writer was stopped, or is still at it.

    Raises:
        DataError: Some other line is not a metrics line.
    """
    path = folder / METRICS_FILE
    if not path.exists():
        return MetricsHistory(rows=())
    lines = path.read_bytes().split(b"\n")
    if lines.pop():
        logger.warning("%s: skipping the last line, which is incomplete", path)
    return MetricsHistory(
        rows=tuple(_parse_line(path, number, line) for number, line in enumerate(lines, start=1))
    )


def _check_names(metrics: Mapping[str, float]) -> None:
    for name in metrics:
        if NAME_PATTERN.fullmatch(name) is None:
            raise ValueError(f"metric {name!r}: expected group/name, such as rlhf/kl")


def _encode(value: float) -> float | str:
    """The value as JSON can hold it."""
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _parse_line(path: Path, number: int, line: bytes) -> MetricsRow:
    try:
        fields: dict[str, Any] = json.loads(line)
        values = {name: float(value) for name, value in fields["metrics"].items()}
        return MetricsRow(step=int(fields["step"]), time=float(fields["time"]), values=values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}:{number}: not a metrics line: {line[:80]!r}") from error


def _remove_torn_line(path: Path) -> None:
    """Cuts the file after its last line end."""
    if not path.exists():
        return
    content = path.read_bytes()
    kept = content.rfind(b"\n") + 1
    if kept < len(content):
        logger.warning(
            "%s: removing an incomplete last line of %d bytes", path, len(content) - kept
        )
        with path.open("r+b") as file:
            file.truncate(kept)

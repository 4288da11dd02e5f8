"""The one place that touches Arrow and Parquet files.

Tables are written block by block and opened memory-mapped, so their size is that of the disk, not
of the memory.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from megachat.data.messages import first_line
from megachat.errors import DataError

TEXT: Any = pyarrow.string()
"""A text, or null."""
INT32: Any = pyarrow.int32()
INT64: Any = pyarrow.int64()
TOKENS: Any = pyarrow.list_(pyarrow.int32())
"""A row of token ids."""

ROWS_AT_ONCE = 256
"""Rows of a block; the memory that any pass over data needs."""


def write_arrow(
    path: Path, columns: Mapping[str, Any], blocks: Iterator[Mapping[str, list[Any]]]
) -> int:
    """Streams blocks of columns into a file that `open_arrow` maps.

    Args:
        path: The file to write.
        columns: Type of each column, one of the constants of this module.
        blocks: Values by column name.

    Returns:
        The number of rows.
    """
    count = 0
    schema = pyarrow.schema(dict(columns))
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for block in blocks:
            batch = pyarrow.RecordBatch.from_pydict(dict(block), schema=schema)
            writer.write_batch(batch)
            count += batch.num_rows
    return count


def open_arrow(path: Path) -> Any:
    """The rows of a file by `write_arrow`: a memory-mapped `datasets.Dataset`.

    Raises:
        DataError: The file is missing or damaged.
    """
    try:
        return datasets.Dataset.from_file(str(path))
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise DataError(
            f"{path}: cached data cannot be read ({first_line(error)}): delete {path.parent} to "
            "build it again"
        ) from error


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Streams the rows of a Parquet file.

    Raises:
        DataError: The file is not Parquet or damaged.
    """
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                for value in batch.to_pylist():
                    row += 1
                    yield value
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: not a readable Parquet file after row {row}: {first_line(error)}"
        ) from error

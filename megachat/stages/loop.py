"""What the stage loops share: their loaders, held-out batches and the files of an export."""

from collections.abc import Mapping
from pathlib import Path

import torch

from megachat.data.loaders import BatchLoader, BatchT, LoaderOptions
from megachat.data.stage_data import TokenSet
from megachat.errors import DataError
from megachat.stages.config import RunConfig
from megachat.stages.context import tokenizer_folder

_EVALUATION_ROWS = 256
"""Rows of a global batch of evaluation."""


def held_out_batches(
    loader: type[BatchLoader[BatchT]], rows: TokenSet, *, count: int
) -> list[BatchT]:
    """The first `count` held-out rows (or all there are), in a fixed order.

    Raises:
        DataError: There are no held-out rows.
    """
    if not len(rows):
        raise DataError(
            f"data for {rows.stage}: no held-out rows to evaluate on: raise data.validation_share"
        )
    count = min(count, len(rows))
    batches: list[BatchT] = []
    for batch in loader(rows, LoaderOptions.for_evaluation(batch_size=_EVALUATION_ROWS)):
        left = count - len(batches) * _EVALUATION_ROWS
        if left <= 0:
            break
        batches.append(batch if batch.num_rows <= left else batch.select(torch.arange(left)))
    return batches


def export_files(config: RunConfig) -> Mapping[str, Path]:
    """Tokenizer files that belong into an exported model folder."""
    folder = tokenizer_folder(config)
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}

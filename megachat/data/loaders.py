"""The one place that turns tokenised rows into global batches.

A loader is the same on every rank: it yields whole batches, of which an engine takes the rows of
its data-parallel coordinate. The order is a function of (seed, epoch) alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megachat.data.blending import Indices, bucketed, epoch_rows, random_for
from megachat.data.config import Recipe, Stage
from megachat.data.stage_data import TokenSet
from megachat.errors import ConfigError, DataError
from megachat.records import PreferenceBatch, PromptBatch, SftBatch

BatchT = TypeVar("BatchT", SftBatch, PreferenceBatch, PromptBatch)


class Order(StrEnum):
    """In which order rows come."""

    SHUFFLED = "shuffled"
    """By (seed, epoch), sources blended by their weights."""
    SEQUENTIAL = "sequential"
    """As they lie on disk, each row once."""


class LastBatch(StrEnum):
    """What happens to the rows that do not fill a last batch."""

    DROP = "drop"
    """They wait for another epoch."""
    FILL = "fill"
    """The batch is filled with the first rows of the epoch's order."""
    SHORT = "short"
    """The last batch is shorter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderOptions:
    """How rows become batches."""

    batch_size: int
    """Rows of a global batch: all data ranks and micro-batches of one step together."""
    seed: int = 1234
    """Seed of the order."""
    order: Order = Order.SHUFFLED
    last: LastBatch = LastBatch.DROP
    bucket_window: int = 0
    """Sort rows by length inside windows of this many batches, which saves padding; 0 or 1 does
    not sort."""
    length_multiple: int = 1
    """Sequence lengths of batches are multiples of this, e.g. of the tensor-parallel degree."""

    def __post_init__(self) -> None:
        """Refuses sizes that make no sense."""
        if self.batch_size < 1 or self.length_multiple < 1 or self.bucket_window < 0:
            raise ConfigError(
                f"loader: batch_size {self.batch_size} and length_multiple {self.length_multiple} "
                f"must be at least 1, bucket_window {self.bucket_window} at least 0"
            )

    @classmethod
    def for_evaluation(cls, *, batch_size: int, length_multiple: int = 1) -> "LoaderOptions":
        """Every row once, in a fixed order; the last batch may be short."""
        return cls(
            batch_size=batch_size,
            order=Order.SEQUENTIAL,
            last=LastBatch.SHORT,
            length_multiple=length_multiple,
        )


class BatchLoader(ABC, Generic[BatchT]):
    """Iterates over the global batches of one epoch; `set_epoch` chooses which."""

    stage: ClassVar[Stage]
    """Stage whose rows this loader reads."""

    def __init__(self, rows: TokenSet, options: LoaderOptions) -> None:
        """Prepares epoch 0.

        Args:
            rows: Tokenised rows of this loader's stage.
            options: Batch size and order.

        Raises:
            ConfigError: The rows are those of another stage.
            DataError: There are too few rows for one batch.
        """
        if rows.stage is not self.stage:
            raise ConfigError(
                f"{type(self).__name__} reads rows of stage '{self.stage}', not of '{rows.stage}'"
            )
        self.rows = rows
        self.options = options
        self._table: Any = rows.table.with_format("arrow")
        self._epoch = 0
        self._first_batch = 0
        if not len(self):
            raise DataError(
                f"data for {self.stage}: {self.rows_per_epoch} rows do not make one batch of "
                f"{options.batch_size}: use a smaller batch or last = '{LastBatch.FILL}'"
            )

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch before they are cut into batches, by the weights of the sources."""
        if self.options.order is Order.SEQUENTIAL:
            return len(self.rows)
        return sum(part.rows_per_epoch for part in self.rows.parts)

    def __len__(self) -> int:
        """Batches of a whole epoch, i.e. optimizer steps."""
        full, rest = divmod(self.rows_per_epoch, self.options.batch_size)
        return full + (rest > 0 and self.options.last is not LastBatch.DROP)

    def set_epoch(self, epoch: int, *, first_batch: int = 0) -> None:
        """Chooses the epoch that the next iteration goes through.

        Args:
            epoch: Each epoch has its own order.
            first_batch: Batches to pass over, to resume inside an epoch.
        """
        self._epoch = epoch
        self._first_batch = first_batch

    def __iter__(self) -> Iterator[BatchT]:
        """The batches of the chosen epoch."""
        size = self.options.batch_size
        order = self._epoch_order()
        for begin in range(self._first_batch * size, len(order), size):
            yield self._assemble(self._table[order[begin : begin + size]])

    @abstractmethod
    def _assemble(self, table: Any) -> BatchT:
        """The batch of some rows of the Arrow table."""

    def _epoch_order(self) -> Indices:
        """Row numbers of an epoch; every batch but the last is a full slice of it."""
        options = self.options
        if options.order is Order.SEQUENTIAL:
            order: Indices = np.arange(len(self.rows))
        else:
            order = epoch_rows(self.rows.parts, seed=options.seed, epoch=self._epoch)
        num_full = len(order) // options.batch_size * options.batch_size
        rest = order[num_full:]
        if options.last is LastBatch.DROP:
            rest = rest[:0]
        elif options.last is LastBatch.FILL and len(rest):
            rest = np.resize(np.concatenate([rest, order]), options.batch_size)
        full = order[:num_full]
        if options.bucket_window > 1 and num_full:
            full = bucketed(
                full,
                lengths=self.rows.lengths,
                batch_size=options.batch_size,
                window=options.bucket_window,
                random=random_for(options.seed, "buckets", self._epoch),
            )
        return np.concatenate([full, rest])

    def _pad(self, columns: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Right-pads token columns to one width.

        Args:
            columns: Arrow list columns of equal numbers of rows.

        Returns:
            Tokens `[columns, rows, seq]` int64 and lengths `[columns, rows]` int64.
        """
        arrays = [column.combine_chunks() for column in columns]
        lengths = np.stack([np.diff(array.offsets.to_numpy()) for array in arrays])
        multiple = self.options.length_multiple
        width = -(-int(lengths.max()) // multiple) * multiple
        tokens = np.full((len(arrays), lengths.shape[1], width), self.rows.pad_id, np.int64)
        for padded, row_lengths, array in zip(tokens, lengths, arrays, strict=True):
            padded[np.arange(width) < row_lengths[:, None]] = array.flatten().to_numpy()
        return torch.from_numpy(tokens), torch.from_numpy(lengths.astype(np.int64))


class SftLoader(BatchLoader[SftBatch]):
    """Batches for supervised training."""

    stage = Stage.SFT

    def _assemble(self, table: Any) -> SftBatch:
        """Marks as targets the tokens that the recipe trains; the first token never is one."""
        (tokens,), (lengths,) = self._pad([table["tokens"]])
        first_target = torch.ones_like(lengths)
        if self.rows.recipe is Recipe.ANSWERS:
            first_target = _int64(table["prompt_length"])
        columns = torch.arange(tokens.shape[1])
        loss_mask = (columns >= first_target[:, None]) & (columns < lengths[:, None])
        return SftBatch(tokens=tokens, lengths=lengths, loss_mask=loss_mask)


class PreferenceLoader(BatchLoader[PreferenceBatch]):
    """Batches of answer pairs for the reward model."""

    stage = Stage.REWARD

    def _assemble(self, table: Any) -> PreferenceBatch:
        tokens, lengths = self._pad([table["chosen_tokens"], table["rejected_tokens"]])
        return PreferenceBatch(
            tokens=tokens.transpose(0, 1).contiguous(),
            lengths=lengths.transpose(0, 1).contiguous(),
            prompt_lengths=_int64(table["prompt_length"]),
        )


class PromptLoader(BatchLoader[PromptBatch]):
    """Batches of prompts for PPO."""

    stage = Stage.PROMPTS

    def _assemble(self, table: Any) -> PromptBatch:
        (tokens,), (lengths,) = self._pad([table["tokens"]])
        return PromptBatch(tokens=tokens, lengths=lengths, ids=_int64(table["id"]))


def endless(loader: BatchLoader[BatchT], *, first_step: int = 0) -> Iterator[BatchT]:
    """The batches of all epochs one after the other, each epoch in its own order.

    Args:
        loader: Its epoch is set here.
        first_step: Batches to pass over, to resume.
    """
    epoch, first_batch = divmod(first_step, len(loader))
    while True:
        loader.set_epoch(epoch, first_batch=first_batch)
        yield from loader
        epoch, first_batch = epoch + 1, 0


def _int64(column: Any) -> Tensor:
    values: NDArray[np.int64] = column.to_numpy().astype(np.int64)
    return torch.from_numpy(values)

"""The one place for what an engine and a loss agree on: `LossTerms` and `LossFunction`.

How an engine drives a loss. A batch record is global: every rank holds all its rows. The engine
picks the rows of one micro-batch with `batch.select(rows)`, asks the loss for the tokens that the
model has to see (`model_input`), how many of each row are real (`row_lengths`; nothing else is
computed) and at which of them the loss reads the output (`output_spans`), and on the last pipeline
stage hands that output back to the loss together with the same micro-batch and one weight per
record row.

Each loss divides by denominators of the *global* batch that it was constructed with, so adding up
`LossTerms.loss` over all micro-batches and all data ranks gives the loss of the global batch,
however the batch was cut. A row with weight zero is filler that evens out micro-batches: it takes
part in the forward and backward pass and contributes nothing.
"""

from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from megachat.records import Batch

BatchT_contra = TypeVar("BatchT_contra", bound=Batch, contravariant=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """What one micro-batch contributes to the loss and the metrics of the global batch."""

    loss: Tensor
    """Scalar with gradient; contributions are *summed* over micro-batches and data ranks."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars by name that are summed like the loss: means over the global batch."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars by name of which the largest over micro-batches and data ranks counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOutput:
    """What a model says at the places a loss or score reads, row after row without padding."""

    values: Tensor
    """`[places, vocab/tp]` logits or `[places]` scalars."""
    rows: Tensor
    """[places] int64, row of `model_input` that each place is in."""
    positions: Tensor
    """[places] int64, position in that row."""

    def following(self, columns: Tensor) -> Tensor:
        """What stands one position after each place.

        Args:
            columns: `[rows, seq]`, such as tokens.

        Returns:
            `[places]`, 0 (or False) past the end of `columns`.
        """
        return torch.nn.functional.pad(columns, (0, 1))[self.rows, self.positions + 1]

    def to_columns(self, values: Tensor, columns: Tensor, *, like: Tensor) -> Tensor:
        """Numbers of the places in a table, with gradient.

        Args:
            values: `[places]`.
            columns: `[places]` int64 column of each place; its row is the row it is in.
            like: `[rows, columns]`, a table of the wanted shape.

        Returns:
            `[rows, columns]` of the dtype of `values`, 0 where there is no place.
        """
        return values.new_zeros(like.shape).index_put((self.rows, columns), values)


class LossFunction(Protocol[BatchT_contra]):
    """Maps a model's output for one micro-batch of records to `LossTerms`.

    The names are known on every rank, also where the loss is never called (all pipeline stages but
    the last), so that all ranks can take part in the reduction of the metrics.
    """

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The keys of `LossTerms.metrics`, in a fixed order."""

    @property
    def maximum_names(self) -> tuple[str, ...]:
        """The keys of `LossTerms.maxima`, in a fixed order."""

    def model_input(self, batch: BatchT_contra) -> Tensor:
        """The token rows the model has to process.

        A record row may need several model rows (a preference pair needs two); they are adjacent
        and their number per record row is constant.

        Returns:
            `[rows, seq]` int64, right-padded.
        """

    def row_lengths(self, batch: BatchT_contra) -> Tensor:
        """Number of real tokens in each row of `model_input(batch)`, `[rows]` int64."""

    def output_spans(self, batch: BatchT_contra) -> Tensor | None:
        """Where the loss reads the model's output.

        Returns:
            `[rows, 2]` int64, first and end position in each row; None: at every real token. Of a
            micro-batch in which nothing is read, the loss is given one place, which it ignores.
        """

    def __call__(self, output: ModelOutput, batch: BatchT_contra, row_weights: Tensor) -> LossTerms:
        """The contribution of one micro-batch.

        Args:
            output: The model's output for `model_input(batch)` at `output_spans(batch)`.
            batch: The micro-batch of records, on the device of `output`.
            row_weights: `[batch.num_rows]` float, one weight per *record* row: 1 for a row that
                counts, 0 for filler.

        Returns:
            Terms whose sum over the global batch is independent of how the batch was cut.
        """

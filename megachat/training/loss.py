"""The one place for what an engine and a loss agree on: `LossTerms` and `LossFunction`.

How an engine drives a loss. A batch record is global: every rank holds all its rows. The engine
picks the rows of one micro-batch with `batch.select(rows)`, asks the loss for the tokens that the
model has to see (`model_input`) and how many of each row are real (`row_lengths`, to trim or extend
the padding), and on the last pipeline stage hands the model's output back to the loss together with
the same micro-batch and one weight per record row.

Each loss divides by denominators of the *global* batch that it was constructed with, so adding up
`LossTerms.loss` over all micro-batches and all data ranks gives the loss of the global batch,
however the batch was cut. A row with weight zero is filler that evens out micro-batches: it takes
part in the forward and backward pass and contributes nothing.
"""

from dataclasses import dataclass, field
from typing import Protocol, TypeVar

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
        """Number of real tokens in each row of `model_input(batch)`, `[rows]` int64.

        An engine may cut the columns beyond the longest row, or append padding columns; the loss
        accepts an output of either width.
        """

    def __call__(self, output: Tensor, batch: BatchT_contra, row_weights: Tensor) -> LossTerms:
        """The contribution of one micro-batch.

        Args:
            output: The model's output for `model_input(batch)`: `[rows, seq, vocab/tp]` logits or
                `[rows, seq]` scalars; `seq` is at least the longest row length.
            batch: The micro-batch of records, on the device of `output`.
            row_weights: `[batch.num_rows]` float, one weight per *record* row: 1 for a row that
                counts, 0 for filler.

        Returns:
            Terms whose sum over the global batch is independent of how the batch was cut.
        """

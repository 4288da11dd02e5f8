"""The one place that cuts a global batch into micro-batches and data-parallel shards (pure).

Every rank holds the whole batch and computes the same cut. All micro-batches have the same number
of rows and all data ranks the same number of micro-batches, so that collectives and pipeline
schedules match; what is missing is filled with rows of weight zero. Rows are grouped by length,
which keeps padding small, and the longest groups are dealt out first, which balances the ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchRows:
    """Rows of the global batch that one micro-batch consists of."""

    rows: tuple[int, ...]
    """Indices into the global batch, fillers included."""
    num_real: int
    """The first `num_real` rows count; the rest are fillers."""
    index: int
    """Number of the micro-batch within the global batch, independent of the data degree."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchPlan:
    """How a global batch is spread over data ranks."""

    shards: tuple[tuple[MicroBatchRows, ...], ...]
    """One sequence of micro-batches per data rank, all equally long."""

    @property
    def rows_in_order(self) -> tuple[int, ...]:
        """Global row of each position when all shards are concatenated; -1 marks fillers."""
        return tuple(
            row if position < micro_batch.num_real else -1
            for shard in self.shards
            for micro_batch in shard
            for position, row in enumerate(micro_batch.rows)
        )


def plan_micro_batches(
    lengths: Sequence[int], *, num_shards: int, rows_per_micro_batch: int
) -> MicroBatchPlan:
    """Cuts a batch of rows.

    Args:
        lengths: Tokens of each row of the global batch, at least one row.
        num_shards: Data-parallel degree.
        rows_per_micro_batch: Rows of a micro-batch; fewer when the batch has fewer.

    Returns:
        A plan that holds every row exactly once with weight one.
    """
    num_rows = len(lengths)
    rows_each = max(1, min(rows_per_micro_batch, -(-num_rows // num_shards)))
    longest_first = sorted(range(num_rows), key=lambda row: (-lengths[row], row))
    cuts = [longest_first[at : at + rows_each] for at in range(0, num_rows, rows_each)]
    num_cuts = -(-len(cuts) // num_shards) * num_shards
    cuts += [[] for _ in range(num_cuts - len(cuts))]
    shortest = longest_first[-1]
    shards: list[list[MicroBatchRows]] = [[] for _ in range(num_shards)]
    for index, cut in enumerate(cuts):
        round_number, position = divmod(index, num_shards)
        # Dealt to and fro, so that no rank always gets the longest group of a round.
        shard = position if round_number % 2 == 0 else num_shards - 1 - position
        fillers = [cut[-1] if cut else shortest] * (rows_each - len(cut))
        shards[shard].append(
            MicroBatchRows(rows=tuple(cut + fillers), num_real=len(cut), index=index)
        )
    return MicroBatchPlan(shards=tuple(tuple(shard) for shard in shards))

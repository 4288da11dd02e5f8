"""The one place for index arithmetic: the split over the steps, the hold-out, and epoch orders.

Pure numpy, eight bytes a row. Every draw is a function of a seed and of names, so all ranks get
the same rows in the same order.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
"""Row numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitIndices:
    """Rows of one stage."""

    train: Indices
    """Ascending, so that they are read in the order they lie on disk."""
    validation: Indices
    """In random order, so that the first few of them are a fair sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Consecutive rows of a blended set that come from one source."""

    source: str
    num_rows: int
    weight: float
    """How often each row appears in an epoch."""

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows this part gives to an epoch: weight x rows, rounded, at least one."""
        return max(1, round(self.weight * self.num_rows)) if self.num_rows else 0


def random_for(seed: int, *names: str | int) -> np.random.Generator:
    """A generator that depends on nothing but its arguments."""
    text = "|".join([str(seed), *(str(name) for name in names)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))


def stage_part(
    num_rows: int, *, weights: Sequence[float], part: int, random: np.random.Generator
) -> Indices:
    """The rows of one stage in random order; the parts are disjoint and cover all rows.

    Args:
        num_rows: Rows to divide.
        weights: Relative share of each part.
        part: Which one.
        random: In the same state for every part.
    """
    ends = np.rint(np.cumsum(weights) / np.sum(weights) * num_rows).astype(np.int64)
    begin = ends[part - 1] if part else 0
    return random.permutation(num_rows)[begin : ends[part]]


def hold_out(rows: Indices, *, share: float, at_most: int | None) -> SplitIndices:
    """Takes the first `share` of randomly ordered rows away for validation.

    At least one row is held out where a share is asked for and at least one is left to train on.
    """
    count = round(share * len(rows))
    if share > 0:
        count = min(max(count, 1), max(len(rows) - 1, 0))
    if at_most is not None:
        count = min(count, at_most)
    return SplitIndices(train=np.sort(rows[count:]), validation=rows[:count])


def epoch_rows(parts: Sequence[Part], *, seed: int, epoch: int) -> Indices:
    """The rows of one epoch in random order, by the weights of their sources.

    A weight's whole number gives complete passes, its fraction a random subset that differs from
    epoch to epoch.
    """
    chosen: list[Indices] = []
    begin = 0
    for number, part in enumerate(parts):
        random = random_for(seed, "blend", epoch, number)
        passes, rest = divmod(part.rows_per_epoch, max(1, part.num_rows))
        chosen += [np.arange(begin, begin + part.num_rows)] * passes
        chosen.append(begin + random.permutation(part.num_rows)[:rest])
        begin += part.num_rows
    rows = np.concatenate(chosen) if chosen else np.empty(0, np.int64)
    random_for(seed, "order", epoch).shuffle(rows)
    return rows


def bucketed(
    order: Indices,
    *,
    lengths: NDArray[np.int32],
    batch_size: int,
    window: int,
    random: np.random.Generator,
) -> Indices:
    """Reorders full batches so that rows of similar length stand together.

    Rows are sorted by length inside windows of `window` batches and cut into batches, then all
    batches are shuffled, so that lengths do not drift over an epoch.

    Args:
        order: Row numbers, a multiple of `batch_size`.
        lengths: Length of every row of the set.
        batch_size: Rows in a batch.
        window: Batches in a window.
        random: Orders the batches.
    """
    step = window * batch_size
    sorted_windows = [
        rows[np.argsort(lengths[rows], kind="stable")]
        for rows in (order[begin : begin + step] for begin in range(0, len(order), step))
    ]
    batches = np.concatenate(sorted_windows).reshape(-1, batch_size)
    return batches[random.permutation(len(batches))].reshape(-1)

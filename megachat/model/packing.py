"""The one place for rows without padding: where a micro-batch's tokens lie, one after the other.

A micro-batch of ragged rows is one sequence of real tokens, `[tokens, 1, hidden]`: norms, matrix
products and the head's logits see nothing else. Only attention needs rows (`by_rows`). The head, in
turn, computes only the places whose output somebody reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor

FEW_ELEMENTS = 1 << 18
"""Up to how many elements a tensor over the rectangle is cheaper to pad than rows are to treat one
by one: a call for a row costs about as much as padding this many. Measured on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPacking:
    """Which places of `[rows, seq]` the packed tokens are, in rising order."""

    num_rows: int
    seq: int
    """Width of the rectangle."""
    longest: int
    """Real tokens of the longest row."""
    num_tokens: int
    """Packed tokens, fillers that even them out included."""
    runs: tuple[tuple[int, int], ...]
    """(number of rows, length) of neighbouring rows that are equally long, fillers included."""
    places: Tensor
    """[tokens] int64 index into the flattened rectangle."""
    outputs: Tensor | None
    """[outputs] int64, packed tokens whose output is read; None: all."""

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        *,
        spans: Sequence[Sequence[int]] | None = None,
        multiple: int = 1,
        device: torch.device | None = None,
    ) -> Self:
        """Packs rows of given lengths.

        Args:
            lengths: Real tokens of each row, at least 1.
            spans: Positions of each row whose output is read, (first, end); None: all. Where
                nobody reads anything the output of the last token is computed all the same, so that
                every micro-batch has one.
            multiple: Of the number of packed tokens; the last row is made longer to reach it.
            device: Of the index tensors.
        """
        num_real = sum(lengths)
        filled = [*lengths[:-1], lengths[-1] + -num_real % multiple]
        seq = max(filled)
        places = torch.cat(
            [torch.arange(row * seq, row * seq + length) for row, length in enumerate(filled)]
        )
        starts = [sum(lengths[:row]) for row in range(len(lengths))]
        if spans is not None:
            ranges = zip(starts, spans, strict=True)
            read = [torch.arange(start + first, start + end) for start, (first, end) in ranges]
            is_read = any(len(part) for part in read)
            outputs: Tensor | None = torch.cat(read) if is_read else torch.tensor([num_real - 1])
        else:
            outputs = None if sum(filled) == num_real else torch.arange(num_real)
        return cls(
            num_rows=len(lengths),
            seq=seq,
            longest=max(lengths),
            num_tokens=sum(filled),
            runs=tuple((len(list(run)), length) for length, run in groupby(filled)),
            places=places.to(device),
            outputs=None if outputs is None else outputs.to(device),
        )

    @property
    def output_places(self) -> Tensor:
        """[outputs] int64, where the packed tokens whose output is read lie in the rectangle."""
        return self.places if self.outputs is None else self.places[self.outputs]

    @property
    def positions(self) -> Tensor:
        """[tokens] int64, each token's position in its row."""
        return self.places % self.seq

    def by_rows(
        self, function: Callable[..., Tensor], *parts: Tensor, at_once: bool = False
    ) -> Tensor:
        """Applies a function that needs to know rows.

        Rows of one length are a view of the packed tokens and go through the function together;
        where there are several lengths it is called for each, or, where tensors are small, once
        for the rectangle with zeros in its empty places.

        Args:
            function: Maps `[rows, length, ...]` tensors to one whose first two dimensions are the
                same; what it says about a position must not depend on later ones of the row.
            *parts: `[tokens, ...]` each.
            at_once: One call for all rows, however large.

        Returns:
            `[tokens, ...]`.
        """
        if len(self.runs) > 1 and (at_once or self._is_small(parts[0])):
            return self._by_rectangle(function, parts)
        if len(self.runs) == 1:
            return _by_run(function, parts, self.runs[0])
        counts = [rows * length for rows, length in self.runs]
        cut = zip(*(torch.split(part, counts) for part in parts), strict=True)
        return torch.cat(
            [
                _by_run(function, run_parts, run)
                for run, run_parts in zip(self.runs, cut, strict=True)
            ]
        )

    def _is_small(self, part: Tensor) -> bool:
        return self.num_rows * self.seq * part[0].numel() <= FEW_ELEMENTS

    def _by_rectangle(self, function: Callable[..., Tensor], parts: Sequence[Tensor]) -> Tensor:
        size = (self.num_rows, self.seq)
        spread = (_spread_rows(part, self.places, self.num_rows * self.seq) for part in parts)
        rows = function(*(part.view(*size, *part.shape[1:]) for part in spread))
        return take_rows(rows.flatten(0, 1), self.places)


def _by_run(
    function: Callable[..., Tensor], parts: Sequence[Tensor], run: tuple[int, int]
) -> Tensor:
    """Applies a function to rows of one length, which lie one after the other."""
    return function(*(part.view(*run, *part.shape[1:]) for part in parts)).flatten(0, 1)


class _Spread(torch.autograd.Function):
    """Rows of a tensor to given places of a larger one; the places are distinct."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, count: int) -> Tensor:
        """Zero elsewhere."""
        ctx.save_for_backward(places)
        return x.new_zeros(count, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Takes them back."""
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


class _Take(torch.autograd.Function):
    """Given rows of a tensor, each at most once: unlike `index_select`, whose gradient adds up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        """The rows at the places."""
        ctx.save_for_backward(places)
        ctx.count = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Zero elsewhere."""
        (places,) = ctx.saved_tensors
        spread = gradient.new_zeros(ctx.count, *gradient.shape[1:])
        return spread.index_copy_(0, places, gradient), None


def _spread_rows(x: Tensor, places: Tensor, count: int) -> Tensor:
    """`[tokens, ...]` to `[count, ...]`, 0 but at the places."""
    spread: Tensor = _Spread.apply(x, places, count)  # type: ignore[no-untyped-call]
    return spread


def take_rows(x: Tensor, places: Tensor) -> Tensor:
    """`[tokens, ...]` to `[places, ...]`; no place occurs twice."""
    taken: Tensor = _Take.apply(x, places)  # type: ignore[no-untyped-call]
    return taken

"""The one place for cases of `all_reduce`: several ranks, each a device, and several calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.kernels.accuracy import FP32_ROUND_OFF, complaint_about
from tests.kernels.build import KERNELS, Variant
from tests.kernels.cases import Case
from tests.kernels.launch import (
    FORMATS,
    Argument,
    Order,
    run_devices_here,
    run_devices_isolated,
)

SOURCE = KERNELS / "cuda" / "all_reduce.cu"
FUNCTION = "megachat_all_reduce"
PACK = 16
"""Bytes that a thread moves at once; messages are whole packs."""
THREADS, MOST_BLOCKS, MOST_RANKS = 128, 64, 8
HEADER_WORDS = MOST_BLOCKS * (1 + MOST_RANKS)
"""32-bit counts and flags in front of a region; the messages follow."""


@dataclass(frozen=True)
class AllReduceCase(Case):
    """Calls of all ranks, one after another on each."""

    launches: tuple[tuple[Argument, ...], ...]
    """Arguments of each call of each rank, in the order of the calls."""
    outs: tuple[tuple[Tensor, ...], ...]
    """For each call, the results of the ranks."""
    exact: tuple[Tensor, ...]
    internal: tuple[Tensor, ...]

    def wrong_result(self) -> str:
        for call, outs in enumerate(self.outs):
            found = complaint_about(f"call {call}", outs[0], self.exact[call], self.internal[call])
            if found:
                return found
            for rank, out in enumerate(outs):
                if not out.equal(outs[0]):
                    return f"rank {rank} has other bits than rank 0 in call {call}"
        return ""

    def fault_here(self, order: Order) -> str:
        return self._judge(run_devices_here(SOURCE, FUNCTION, self.launches, order))

    def fault_isolated(
        self, order: Order, *, variant: Variant, folder: Path, source: Path | None = None
    ) -> str:
        outcome = run_devices_isolated(
            source or SOURCE, FUNCTION, self.launches, order, variant=variant, folder=folder
        )
        return self._judge(outcome)


def all_reduce_case(
    dtype: torch.dtype,
    *,
    ranks: int,
    packs: Sequence[int],
    calls_before: int = 0,
    in_place: bool = False,
) -> AllReduceCase:
    """Numbers of very different size, so that the order in which they are added shows.

    `ranks - 1` additions in fp32, each with an error of at most a round-off of the sum of absolute
    values.

    Args:
        dtype: Of the messages.
        ranks: Devices.
        packs: For each call, the size of its message in packs of 16 bytes.
        calls_before: What the counts and flags of all ranks are at.
        in_place: The sum replaces the message.
    """
    generator = torch.Generator().manual_seed(ranks + len(packs))
    elements = [count * PACK // dtype.itemsize for count in packs]
    size = (ranks, max(elements))
    messages = []
    for count in elements:
        scale = torch.randint(-6, 6, size, generator=generator)[:, :count]
        numbers = torch.randn(size, generator=generator)[:, :count]
        messages.append(torch.ldexp(numbers, scale).to(dtype))
    inputs = [tuple(row.clone() for row in message) for message in messages]
    outs = inputs
    if not in_place:
        outs = [tuple(torch.full_like(row, torch.nan) for row in given) for given in inputs]
    regions = tuple(new_region(max(packs), calls_before) for _ in range(ranks))
    launches = []
    for given, results in zip(inputs, outs, strict=True):
        launches += calls_of(regions, given, results, capacity=max(packs) * PACK)
    wide = [message.double() for message in messages]
    return AllReduceCase(
        kernel="all_reduce",
        arguments=(),
        launches=tuple(launches),
        outs=tuple(outs),
        exact=tuple(message.sum(0) for message in wide),
        internal=tuple((ranks - 1) * FP32_ROUND_OFF * message.abs().sum(0) for message in wide),
    )


def calls_of(
    regions: tuple[Tensor, ...],
    inputs: Sequence[Tensor],
    outs: Sequence[Tensor],
    *,
    capacity: int,
) -> list[tuple[Argument, ...]]:
    """Arguments of one call of every rank. A rank's stream is the address of its region."""
    ranks = len(regions)
    return [
        (
            *(FORMATS[given.dtype], given, out, regions, rank, ranks),
            *(given.numel(), capacity, regions[rank]),
        )
        for rank, (given, out) in enumerate(zip(inputs, outs, strict=True))
    ]


def new_region(packs: int, calls_before: int = 0) -> Tensor:
    """A region for messages of up to so many packs; the room for them is NaN."""
    blocks = min(-(-packs // THREADS), MOST_BLOCKS)
    room = max(-(-packs // MOST_BLOCKS), THREADS)
    words = torch.full((HEADER_WORDS + blocks * 2 * room * PACK // 4,), -1, dtype=torch.int32)
    words[:HEADER_WORDS] = torch.tensor([calls_before]).view(torch.int32)[0]
    return words

"""Sums through shared memory are the sums, the same bits on all ranks, and wait for everybody."""

import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megachat.errors import KernelError
from megachat.ops import all_reduce as module
from megachat.ops.all_reduce import PLACE_BYTES, SharedSum, group_sum
from megachat.ops.registry import Backend
from tests.harness import run_ranks

DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}
"""Of a sum of four, relative to the largest sum."""
PIECES = PLACE_BYTES // 4
COUNTS = (1, 7, 768, PIECES - 1, PIECES, PIECES + 1, 3 * PIECES + 5)


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _message(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * count + rank)
    return torch.randn(count, generator=generator).to(dtype)


def _sums() -> list[Tensor]:
    """Of all sizes and dtypes, each twice in a row; checked, and returned to be compared."""
    group = _world()
    add_up = group_sum(group, Backend.CPU)
    assert isinstance(add_up, SharedSum)
    found = []
    for dtype in DTYPES:
        for count in COUNTS:
            messages = [_message(rank, count, dtype) for rank in range(group.size())]
            exact = torch.stack(messages).double().sum(dim=0)
            for _ in range(2):
                mine = messages[group.rank()].clone()
                assert add_up(mine) is mine
                error = (mine.double() - exact).abs().max() / exact.abs().max()
                assert error.item() <= ROUNDING[dtype], (dtype, count)
            found.append(mine)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_sums_of_all_sizes_are_exact_to_rounding_and_equal_on_all_ranks(ranks: int) -> None:
    first, *others = run_ranks(ranks, _sums)
    for other in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))


def _uneven() -> None:
    """Hundreds of sums between which ranks work for different times, so that some run ahead."""
    group = _world()
    add_up = group_sum(group, Backend.CPU)
    generator = torch.Generator().manual_seed(group.rank())
    for call in range(400):
        for _ in range(int(torch.randint(0, 4, (), generator=generator))):
            torch.ones(64, 64) @ torch.ones(64, 64)
        value = torch.full((33,), float(call * (group.rank() + 1)))
        assert torch.equal(add_up(value), torch.full((33,), call * 6.0)), call


def test_a_rank_that_runs_ahead_overwrites_nothing() -> None:
    run_ranks(3, _uneven)


def _left_alone() -> None:
    """The second rank does not come."""
    group = _world()
    add_up = group_sum(group, Backend.CPU)
    if group.rank() == 0:
        started = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "GROUP_TIMEOUT", timedelta(seconds=0.3))
            with pytest.raises(KernelError, match="rank 1 of 2 did not come to sum 0 within"):
                add_up(torch.ones(4))
        assert 0.3 <= time.monotonic() - started < 30


def test_a_rank_that_does_not_come_is_named() -> None:
    run_ranks(2, _left_alone)


def _ways(folder: str) -> list[str]:
    """How sums go with and without shared memory, and what is left of it."""
    group = _world()
    ways = [
        type(group_sum(group, backend)).__name__ for backend in (Backend.CPU, Backend.REFERENCE)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SHARED_MEMORY", Path(folder))
        if group.rank() == 1:  # as on another machine
            patch.setattr(module, "_open", lambda *_: None)
        apart = group_sum(group, Backend.CPU)
    assert isinstance(apart, partial)
    value = torch.ones(3)
    assert apart(value).tolist() == [2.0, 2.0, 2.0]
    return [*ways, type(apart).__name__]


def test_ranks_that_share_no_memory_sum_through_the_network(tmp_path: Path) -> None:
    for ways in run_ranks(2, _ways, str(tmp_path)):
        assert ways == ["SharedSum", "partial", "partial"]
    assert not list(tmp_path.iterdir())


def _refused() -> None:
    add_up = group_sum(_world(), Backend.CPU)
    with pytest.raises(KernelError, match="all_reduce has no CPU kernel for torch.float64"):
        add_up(torch.ones(2, dtype=torch.float64))


def test_what_the_kernel_would_misread_is_refused() -> None:
    run_ranks(2, _refused)

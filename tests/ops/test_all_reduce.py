"""Sums through memory in common are the sums, the same bits on all ranks, and wait for everybody.

Where GPUs map each other's memory, the kernel is on the emulator and every rank is a process.
"""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megachat.errors import KernelError, PhaseError
from megachat.ops import all_reduce as module
from megachat.ops import cuda_kernels, peer_memory
from megachat.ops.all_reduce import PLACE_BYTES, BackendSum, PeerSum, SharedSum, group_sum
from megachat.ops.registry import Backend
from tests.harness import run_ranks
from tests.kernels.emulated import KernelCalls, emulated_cuda
from tests.kernels.launch import RANDOM, Order

CPU = torch.device("cpu")
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
    add_up = group_sum(group, Backend.CPU, device=CPU)
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
    add_up = group_sum(group, Backend.CPU, device=CPU)
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
    add_up = group_sum(group, Backend.CPU, device=CPU)
    if group.rank() == 0:
        started = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "GROUP_TIMEOUT", timedelta(seconds=0.3))
            with pytest.raises(KernelError, match="rank 1 of 2 did not come to sum 0 within"):
                add_up(torch.ones(4))
        assert 0.3 <= time.monotonic() - started < 30


def test_a_rank_that_does_not_come_is_named() -> None:
    run_ranks(2, _left_alone)


def _closed() -> int:
    """Maps of the region that this process has after it has closed its sum."""
    group = _world()
    add_up = group_sum(group, Backend.CPU, device=CPU)
    assert torch.equal(add_up(torch.ones(3)), torch.full((3,), 2.0))
    assert "megachat-sum-" in Path("/proc/self/maps").read_text(encoding="utf-8")
    if group.rank() == 0:  # waits for nobody
        for _ in range(2):
            add_up.close()
        with pytest.raises(PhaseError, match="SharedSum was closed"):
            add_up(torch.ones(3))
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("megachat-sum-")


def test_a_closed_sum_has_unmapped_the_memory_in_common() -> None:
    assert run_ranks(2, _closed) == [0, 1]


def _ways(folder: str) -> list[str]:
    """How sums go with and without shared memory, and what is left of it."""
    group = _world()
    ways = [
        type(group_sum(group, backend, device=CPU)).__name__
        for backend in (Backend.CPU, Backend.REFERENCE)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_memory, "_SHARED_MEMORY", Path(folder))
        if group.rank() == 1:  # as on another machine
            patch.setattr(peer_memory, "_open", lambda *_: None)
        apart = group_sum(group, Backend.CPU, device=CPU)
    assert isinstance(apart, BackendSum)
    value = torch.ones(3)
    assert apart(value).tolist() == [2.0, 2.0, 2.0]
    return [*ways, type(apart).__name__]


def test_ranks_that_share_no_memory_sum_through_the_network(tmp_path: Path) -> None:
    for ways in run_ranks(2, _ways, str(tmp_path)):
        assert ways == ["SharedSum", "BackendSum", "BackendSum"]
    assert not list(tmp_path.iterdir())


def _refused() -> None:
    add_up = group_sum(_world(), Backend.CPU, device=CPU)
    with pytest.raises(KernelError, match="all_reduce has no CPU kernel for torch.float64"):
        add_up(torch.ones(2, dtype=torch.float64))


def test_what_the_kernel_would_misread_is_refused() -> None:
    run_ranks(2, _refused)


PEER_DTYPES = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Rounding of a sum of four, relative to the largest sum."""
MOST = cuda_kernels.ALL_REDUCE_BYTES
PEER_BYTES = (16, 48, 2048, 2064, 5 * 2048 + 16, 3 << 16, MOST)
"""A pack, some, those of a block, one more, several blocks, all blocks, all there is room for."""


def _peer_sum(group: dist.ProcessGroup) -> PeerSum:
    add_up = group_sum(group, Backend.CUDA, device=CPU)
    assert isinstance(add_up, PeerSum)
    return add_up


def _sums_of_peers(order: Order | None) -> tuple[list[Tensor], int]:
    """Of all sizes and dtypes, small and large in turn; how many sums the kernel made."""
    group, found = _world(), []
    with emulated_cuda(order), KernelCalls() as calls:
        add_up = _peer_sum(group)
        for dtype, rounding in PEER_DTYPES.items():
            for num_bytes in PEER_BYTES:
                count = num_bytes // dtype.itemsize
                messages = [_message(rank, count, dtype) for rank in range(group.size())]
                exact = torch.stack(messages).double().sum(dim=0)
                mine = messages[group.rank()].view(-1, 8 // dtype.itemsize)
                assert add_up(mine) is mine
                error = (mine.view(-1).double() - exact).abs().max() / exact.abs().max()
                assert error.item() <= rounding, (dtype, num_bytes)
                found.append(mine)
    return found, calls.counts["all_reduce"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_gpus_get_the_same_exact_sums_through_their_memory(ranks: int) -> None:
    (first, count), *others = run_ranks(ranks, _sums_of_peers, None)
    assert count == len(PEER_DTYPES) * len(PEER_BYTES)
    for other, _ in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))


def test_gpus_may_run_their_blocks_in_different_orders() -> None:
    """Each rank draws its own."""
    (first, _), (second, _) = run_ranks(2, _in_an_order_of_its_own)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))


def _in_an_order_of_its_own() -> tuple[list[Tensor], int]:
    return _sums_of_peers(Order(RANDOM.kind, _world().rank(), "random"))


def _uneven_peers() -> None:
    """Sums between which ranks work for different times, so that some run ahead."""
    group = _world()
    generator = torch.Generator().manual_seed(group.rank())
    with emulated_cuda():
        add_up = _peer_sum(group)
        for call in range(60):
            time.sleep(torch.rand((), generator=generator).item() / 500)
            value = torch.full((36,), float(call * (group.rank() + 1)))
            assert torch.equal(add_up(value), torch.full((36,), call * 6.0)), call


def test_a_gpu_that_runs_ahead_overwrites_nothing() -> None:
    run_ranks(3, _uneven_peers)


def _left_alone_by_a_gpu() -> tuple[str, float]:
    """What the first rank is told when the second does not come, and after how long."""
    group = _world()
    with emulated_cuda(patience_ms=300) as library:
        add_up = _peer_sum(group)
        if group.rank() == 1:
            return "", 0.0
        started = time.monotonic()
        with pytest.raises(KernelError, match=r"all_reduce was not launched \(cudaError 719\)"):
            add_up(torch.ones(4))
        return library.of("all_reduce").simt_error().decode(), time.monotonic() - started


def test_the_emulator_says_that_a_gpu_does_not_come() -> None:
    (error, seconds), _ = run_ranks(2, _left_alone_by_a_gpu)
    assert error.startswith("no progress for 300 ms in kernel (all_reduce_kernel<T, 2>):")
    assert "1 threads poll a flag, the first is (1,0,0) of block (0,0,0) at all_reduce.cu" in error
    assert 0.3 <= seconds < 30


def _large_and_misaligned() -> list[Tensor]:
    """Sums of what the kernel does not take, and what it refuses."""
    group, rank = _world(), _world().rank()
    with emulated_cuda(), KernelCalls() as calls:
        add_up = _peer_sum(group)
        large = [add_up(_message(rank, MOST // dtype.itemsize + 1, dtype)) for dtype in PEER_DTYPES]
        assert not calls.counts
        empty = add_up(torch.empty(0, 8))
        assert empty.shape == (0, 8)
        with pytest.raises(KernelError, match="all_reduce reads 16 bytes at once"):
            add_up(torch.ones(5))
        with pytest.raises(KernelError, match="starts between two such packs"):
            add_up(torch.ones(9)[1:])
        with pytest.raises(KernelError, match="needs contiguous torch.float32 tensors"):
            add_up(torch.ones(4, 8)[:, :4])
        with pytest.raises(KernelError, match="no CPU kernel for torch.float64"):
            add_up(torch.ones(2, dtype=torch.float64))
    return large


def test_large_messages_go_through_the_group_and_others_are_refused() -> None:
    ranks = run_ranks(2, _large_and_misaligned)
    for number, (dtype, rounding) in enumerate(PEER_DTYPES.items()):
        count = MOST // dtype.itemsize + 1
        exact = sum(_message(rank, count, dtype).double() for rank in range(2))
        assert isinstance(exact, Tensor)
        for sums in ranks:
            assert (sums[number] - exact).abs().max() <= rounding * exact.abs().max()


def _arrived(ranks: int) -> list[Tensor]:
    """Regions in which the others have come to many calls, and have left zeros."""
    size = cuda_kernels.all_reduce_region_bytes(CPU)
    regions = [torch.zeros(size, dtype=torch.uint8) for _ in range(ranks)]
    for region in regions:
        region[64 * 4 : 64 * (1 + 8) * 4].view(torch.int32).fill_(1000)  # behind 64 counts
    return regions


def test_schema_and_fake_tell_what_the_sum_does() -> None:
    """torch's own check of what is written: it repeats a call on copies of its arguments."""
    operation = torch.ops.megachat.all_reduce.default
    with emulated_cuda(patience_ms=0):
        for message in (torch.ones(8), torch.ones(3, 8).half()):
            torch.library.opcheck(
                operation,
                (message, _arrived(3), 1),
                test_utils=("test_schema", "test_faketensor"),
            )
        message = torch.ones(8)
        operation(message, _arrived(2), 1)
        assert torch.equal(message, torch.ones(8))


def test_regions_that_are_too_small_and_too_many_ranks_are_refused() -> None:
    operation = torch.ops.megachat.all_reduce.default
    with emulated_cuda(patience_ms=0):
        regions = _arrived(cuda_kernels.ALL_REDUCE_RANKS)
        operation(torch.ones(4), regions, 1)
        with pytest.raises(KernelError, match="cudaError 1"):
            operation(torch.ones(4), [*regions, regions[0]], 1)
        with pytest.raises(KernelError, match="cudaError 1"):
            operation(torch.ones(MOST // 4 + 4), regions, 1)
        with pytest.raises(KernelError, match="needs regions of 2099456 bytes, got"):
            operation(torch.ones(4), [regions[0], regions[1][16:]], 1)


def _apart(most_ranks: int) -> str:
    """How sums go where GPUs do not reach each other, or are too many."""
    with emulated_cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_kernels, "ALL_REDUCE_RANKS", most_ranks)
        if most_ranks >= 2:
            patch.setattr(peer_memory, "map_regions", lambda *_: None)
        add_up = group_sum(_world(), Backend.CUDA, device=CPU)
        assert torch.equal(add_up(torch.ones(3)), torch.full((3,), 2.0))
    return type(add_up).__name__


@pytest.mark.parametrize("most_ranks", [1, 2])
def test_gpus_that_do_not_reach_each_other_sum_through_the_group(most_ranks: int) -> None:
    assert run_ranks(2, _apart, most_ranks) == ["BackendSum", "BackendSum"]

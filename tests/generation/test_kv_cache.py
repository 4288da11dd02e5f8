"""The paged cache: layout, tables, copies, and memory that comes and goes."""

import pytest
import torch

from megachat.errors import CapacityError, ConfigError
from megachat.generation.blocks import BlockCopy
from megachat.generation.kv_cache import PagedKvCache, block_bytes
from megachat.generation.scheduler import Schedule, TableEntry
from megachat.parallel.memory import ReallocatedBuffer
from tests.model import reference as ref

CPU = torch.device("cpu")
EMPTY = Schedule(
    decode=(), longest=0, chunks=(), first_tokens=(), lengths=(), table_entries=(), copies=(),
    preempted=(),
)  # fmt: skip


def _cache(
    *, num_bytes: int = 1 << 20, block_size: int = 4, dtype: torch.dtype = torch.float32
) -> PagedKvCache:
    return PagedKvCache(
        ref.PRE_LN,
        tensor=2,
        num_bytes=num_bytes,
        block_size=block_size,
        max_sequences=3,
        dtype=dtype,
        device=CPU,
    )


def test_a_block_takes_the_bytes_of_its_keys_and_values_over_all_layers() -> None:
    """4 layers x (key, value) x 4 tokens x hidden 32 / 2 ranks."""
    size = block_bytes(ref.PRE_LN, tensor=2, block_size=4, dtype=torch.float32)
    assert size == 4 * 2 * 4 * 16 * 4
    assert block_bytes(ref.PRE_LN, tensor=2, block_size=4, dtype=torch.bfloat16) == size / 2
    cache = _cache(num_bytes=10 * size + size // 2)
    assert cache.num_blocks == 10
    keys, values = cache.layer(3)
    assert keys.shape == values.shape == (10, 4, 2, 8)
    assert keys.is_contiguous() and values.is_contiguous()


def test_layers_keys_and_values_do_not_overlap() -> None:
    cache = _cache()
    for layer in range(4):
        for part, tensor in enumerate(cache.layer(layer)):
            tensor.fill_(2 * layer + part)
    for layer in range(4):
        for part, tensor in enumerate(cache.layer(layer)):
            assert tensor.eq(2 * layer + part).all()


def test_a_schedule_is_applied_to_tables_lengths_and_blocks() -> None:
    cache = _cache()
    for layer in range(4):
        keys, values = cache.layer(layer)
        keys[:4] = torch.arange(4.0).view(4, 1, 1, 1) + 10 * layer
        values[:4] = -keys[:4]
    copies = (BlockCopy(source=1, target=3), BlockCopy(source=2, target=1))
    entries = (TableEntry(slot=2, column=0, block=3), TableEntry(slot=0, column=4, block=7))
    cache.apply(
        Schedule(
            decode=(),
            longest=0,
            chunks=(),
            first_tokens=(),
            lengths=((2, 9),),
            table_entries=entries,
            copies=copies,
            preempted=(),
        )  # fmt: skip
    )
    for layer in range(4):
        keys, values = cache.layer(layer)
        # All copies read before any writes: block 3 has the old content of block 1.
        assert keys[:4, 0, 0, 0].tolist() == [10 * layer + block for block in (0, 2, 2, 1)]
        assert torch.equal(values[:4], -keys[:4])
    assert cache.tables.shape == (3, 5)
    assert cache.tables.tolist() == [[0, 0, 0, 0, 7], [0] * 5, [3, 0, 0, 0, 0]]
    assert cache.lengths.tolist() == [0, 0, 9]
    cache.apply(EMPTY)
    assert cache.lengths.tolist() == [0, 0, 9]


def test_positions_lead_through_the_table() -> None:
    cache = _cache()
    tables = torch.tensor([[5, 2, 9], [5, 2, 9], [1, 0, 0]], dtype=torch.int32)
    slots = cache.positions_of(tables, torch.tensor([0, 6, 3]))
    assert slots.tolist() == [20, 10, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_comes_with_the_first_write_goes_with_release_and_keeps_its_address(
    dtype: torch.dtype,
) -> None:
    cache = _cache(num_bytes=64 << 20, dtype=dtype)
    keys, _ = cache.layer(0)
    address = keys.data_ptr()
    assert cache.resident_bytes == 0
    for _ in range(2):
        cache.pool.fill_(1.0)
        assert cache.resident_bytes >= 63 << 20
        cache.release()
        assert cache.resident_bytes == 0
    assert keys.data_ptr() == cache.layer(0)[0].data_ptr() == address
    keys.fill_(2.0)
    assert cache.layer(0)[0].eq(2.0).all()


def test_ordinary_memory_serves_a_pool_too() -> None:
    """As on devices without address-stable memory."""
    size = block_bytes(ref.PRE_LN, tensor=2, block_size=4, dtype=torch.float32)
    memory = ReallocatedBuffer(10 * size, CPU)
    cache = PagedKvCache(
        ref.PRE_LN,
        tensor=2,
        num_bytes=10 * size,
        block_size=4,
        max_sequences=3,
        dtype=torch.float32,
        device=CPU,
        memory=lambda _: memory,
    )
    for _ in range(2):
        cache.acquire()
        cache.pool.fill_(1.0)
        assert cache.resident_bytes == 10 * size
        assert cache.layer(3)[1].eq(1.0).all()
        cache.release()
        assert cache.resident_bytes == 0


def test_a_pool_without_one_block_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        CapacityError, match="cache of 2047 bytes cannot hold one block of 4 tokens, 2048"
    ):
        _cache(num_bytes=2047)
    with pytest.raises(ConfigError, match="block_size is 0"):
        _cache(block_size=0)

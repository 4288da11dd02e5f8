"""Attention over pages against float64 attention of each sequence by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megachat.ops import paged_cache
from megachat.ops.registry import Backend
from tests.ops.pages import attention, make_pages

REFERENCE = Backend.REFERENCE
BACKENDS = (REFERENCE, Backend.CPU)
DTYPES = (torch.float32, torch.bfloat16)


def _assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().clamp(min=1.0)
    assert ((found.double() - expected).abs().max() / scale).item() <= tolerance


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 3, 16, 64]),
    dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from(BACKENDS),
)
def test_decode_attends_to_the_row_s_own_tokens(
    lengths: list[int], block_size: int, dtype: torch.dtype, backend: Backend
) -> None:
    pages = make_pages(lengths, block_size=block_size, dtype=dtype)
    query = torch.randn(len(lengths), 2, 8).to(dtype)
    op = paged_cache.paged_attention_decode
    found = op.on(backend)(query, pages.keys, pages.values, pages.tables, torch.tensor(lengths))
    assert found.dtype is dtype
    for row, (key, value) in enumerate(pages.whole):
        if not lengths[row]:
            assert not found[row].any()
            continue
        expected = attention(query[row, None], key, value, start=lengths[row] - 1)[0]
        _assert_close(found[row], expected, op.tolerance[dtype])


def test_decode_in_pieces_equals_decode_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [5, 30, 1, 17, 9]
    pages = make_pages(lengths, block_size=8)
    query = torch.randn(5, 2, 8)
    arguments = (query, pages.keys, pages.values, pages.tables, torch.tensor(lengths))
    decode = paged_cache.paged_attention_decode.on(REFERENCE)
    expected = decode(*arguments)
    monkeypatch.setattr(paged_cache, "GATHER_ELEMENTS", 2 * 32 * 16)
    torch.testing.assert_close(decode(*arguments), expected)


@settings(deadline=None, max_examples=60)
@given(
    chunks=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 3, 16]),
    dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from(BACKENDS),
)
def test_prefill_attends_to_the_chunk_and_to_what_precedes_it(
    chunks: list[tuple[int, int]], block_size: int, dtype: torch.dtype, backend: Backend
) -> None:
    pages = make_pages(
        [start + count for start, count in chunks], block_size=block_size, dtype=dtype
    )
    starts, counts = (torch.tensor(column) for column in zip(*chunks, strict=True))
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    query = torch.randn(int(offsets[-1]), 2, 8).to(dtype)
    op = paged_cache.paged_attention_prefill
    found = op.on(backend)(query, pages.keys, pages.values, pages.tables, starts, offsets)
    for row, (start, count) in enumerate(chunks):
        part = slice(int(offsets[row]), int(offsets[row]) + count)
        expected = attention(query[part], *pages.whole[row], start=start)
        _assert_close(found[part], expected, op.tolerance[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_stores_keys_and_values_and_leaves_everything_else(
    dtype: torch.dtype, backend: Backend
) -> None:
    heads, head_dim, tokens = 2, 4, 3
    qkv = torch.randn(tokens, heads * 3 * head_dim).to(dtype)
    bias = torch.randn(heads * 3 * head_dim).to(dtype)
    keys, values = torch.zeros(2, 5, 3, heads, head_dim).to(dtype)
    slots = torch.tensor([14, 0, 7])
    query = paged_cache.kv_append.on(backend)(qkv, bias, keys, values, slots)
    expected = (qkv + bias).view(tokens, heads, 3, head_dim)
    assert torch.equal(query, expected[:, :, 0])
    for cache, part in ((keys, 1), (values, 2)):
        flat = cache.view(15, heads, head_dim)
        assert torch.equal(flat[slots], expected[:, :, part])
        flat[slots] = 0
        assert not cache.any()

"""Launches and bytes of decode steps: against the sizes of tensors that a step reads and writes."""

import shutil

import pytest
import torch

from megachat.errors import KernelError
from megachat.model.config import OPT_MODELS
from tools.kernel_launches import (
    KERNELS,
    Call,
    Format,
    Launch,
    decode_calls,
    other_calls,
    shape_of,
)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")

SMALL = shape_of("facebook/opt-125m", rows=2, context=48)
LARGE = shape_of("facebook/opt-13b", rows=64, context=1024)


def calls_by_source(calls: list[Call]) -> dict[str, list[Call]]:
    return {
        source: [c for c in calls if c.source == source] for source in {c.source for c in calls}
    }


@pytest.mark.parametrize("number", Format)
@pytest.mark.parametrize("shape", [SMALL, LARGE, shape_of("facebook/opt-175b", ranks=8)])
def test_every_call_is_one_that_its_launcher_accepts(shape, number) -> None:
    for call in (*decode_calls(shape, number), *other_calls(shape, number)):
        launches = call.launches()
        assert launches, call.op
        assert call.launches() == launches, "asking does not change the answer"
        assert call.asked >= call.least > 0, call.op
        for launch in launches:
            assert launch.threads % 32 == 0, call.op
            assert launch.shared_bytes <= 48 << 10, call.op


def test_every_source_is_called() -> None:
    shape = shape_of("facebook/opt-175b", ranks=8)
    calls = decode_calls(shape, Format.BFLOAT16) + other_calls(shape, Format.BFLOAT16)
    assert {call.source for call in calls} == {
        path.stem for path in (KERNELS / "cuda").glob("*.cu")
    }


def test_one_block_takes_a_head_of_a_row_or_a_row_or_a_tile() -> None:
    calls = calls_by_source(
        decode_calls(SMALL, Format.FLOAT32) + other_calls(SMALL, Format.FLOAT32)
    )
    (attention,) = calls["paged_attention_decode"][0].launches()
    assert (attention.grid, attention.threads) == ((2, 12, 1), 128)
    assert calls["sample"][0].launches()[0].grid == (2, 1, 1)
    assert calls["sample_combine"][0].launches() == (
        Launch(kernel="sample_combine_kernel", grid=(1, 1, 1), threads=128, shared_bytes=0),
    )
    (prefill,) = calls["paged_attention_prefill"][0].launches()
    assert prefill.grid == (48 // 32 + 1, 12, 1)


def test_the_least_is_the_size_of_the_tensors() -> None:
    """Of a 125m decode step: what its tensors hold, allocated and counted."""
    calls = calls_by_source(decode_calls(SMALL, Format.BFLOAT16))
    bf16 = torch.bfloat16

    def size(*shapes: tuple[int, ...], dtype: torch.dtype = bf16) -> int:
        return sum(torch.empty(shape, dtype=dtype).nbytes for shape in shapes)

    cache = size((2, 48, 12, 64), (2, 48, 12, 64))
    tables, lengths = size((2, 3), dtype=torch.int32), size((2,), dtype=torch.int64)
    vectors = size((2, 12, 64), (2, 12, 64))
    assert calls["paged_attention_decode"][0].least == cache + vectors + tables + lengths
    assert calls["kv_append"][0].least == size((2, 2304), (2304,), (2, 12, 3, 64)) + lengths
    norm = calls["bias_residual_layer_norm"][0]
    assert norm.least == size(*[(2, 768)] * 4, *[(768,)] * 3)
    assert norm.times == 24
    assert calls["sample"][0].least == size((2, 50304)) + size((4, 2), dtype=torch.float64)
    products = {call.op: call.least for call in calls["tiled_linear"]}
    assert products["QKV product"] == size((2, 768), (2304, 768), (2, 2304))
    assert products["first MLP product, bias, ReLU"] == size(
        (2, 768), (3072, 768), (3072,), (2, 3072)
    )
    assert products["logits"] == size((2, 768), (50304, 768), (2, 50304))
    (relu,) = calls_by_source(other_calls(SMALL, Format.BFLOAT16))["bias_relu"]
    assert relu.least == size((48, 3072), (3072,), (48, 3072))
    assert relu.asked - relu.least == (48 - 1) * size((3072,))


def test_kernels_that_read_everything_once_ask_for_the_least() -> None:
    """All but the biases, which each token asks for again."""
    for call in decode_calls(SMALL, Format.FLOAT16):
        if call.source == "kv_append":
            assert call.asked - call.least == (2 - 1) * 2304 * 2
        if call.source == "bias_residual_layer_norm":
            assert call.asked - call.least == (2 - 1) * 3 * 768 * 2


def test_splits_of_the_attention_write_and_read_their_parts() -> None:
    one_row = shape_of("facebook/opt-125m", rows=1, context=2048)
    (call,) = (
        c for c in decode_calls(one_row, Format.BFLOAT16) if c.source == "paged_attention_decode"
    )
    attention, combine = call.launches()
    splits = attention.grid[2]
    assert splits == 8
    assert combine.kernel == "combine_splits_kernel"
    parts = 2 * splits * 12 * (64 + 2) * 4
    pages = 2048 // 16 * 4
    more_queries, more_tables = (splits - 1) * 768 * 2, (12 - 1) * (pages + 8)
    assert call.asked - call.least == parts + more_queries + more_tables


def test_products_read_the_weight_once_and_the_tokens_for_every_64_rows() -> None:
    """Of two rows, 3072 inputs and 768 outputs, in splits whose parts are written and read."""
    (call,) = (c for c in decode_calls(SMALL, Format.BFLOAT16) if c.op == "second MLP product")
    product, add = call.launches()
    splits = product.grid[2]
    assert product.grid == (1, 768 // 64, splits)
    assert splits > 1
    assert add.kernel == "add_splits_kernel"
    tokens_again, parts = (768 // 64 - 1) * 2 * 3072 * 2, 2 * splits * 2 * 768 * 4
    assert call.asked - call.least == tokens_again + parts


def test_an_all_reduce_reads_the_messages_of_all_ranks_and_is_for_short_ones() -> None:
    """16 rows of 12288 columns are 384 KiB in bf16; 32 in fp32 are more than the kernel takes."""
    shape = shape_of("facebook/opt-175b", ranks=8, rows=16)
    (call,) = (c for c in decode_calls(shape, Format.BFLOAT16) if c.source == "all_reduce")
    message = 16 * 12288 * 2
    assert call.times == 2 * 96
    assert call.least == 2 * message
    assert call.asked == (1 + 1 + 8 + 1) * message
    assert [launch.kernel for launch in call.launches()] == ["all_reduce_kernel"]
    large = shape_of("facebook/opt-175b", ranks=8, rows=32)
    assert not [c for c in decode_calls(large, Format.FLOAT32) if c.source == "all_reduce"]


def test_a_rank_has_its_share_and_whole_groups_of_the_vocabulary() -> None:
    shape, config = shape_of("facebook/opt-175b", ranks=8), OPT_MODELS["facebook/opt-175b"]
    assert shape.heads * 8 == config.heads
    assert shape.ffn * 8 == config.ffn
    assert shape.vocab % 128 == 0
    assert 0 <= shape.vocab * 8 - config.vocab_size < 8 * 128


def test_a_call_that_a_launcher_refuses_is_an_error() -> None:
    shape = shape_of("facebook/opt-125m", rows=-1)
    with pytest.raises(KernelError, match="refuses attention: it returned 1"):
        next(c for c in decode_calls(shape, Format.BFLOAT16) if c.op == "attention").launches()

"""The CPU kernels against float64, as this CPU runs them, as plain code, and with wider vectors.

Sums are in float32, results are rounded once: the bounds are the dtype's rounding and that of an
attention score, whatever the head size, the block size and the lengths.
"""

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megachat.errors import KernelError
from megachat.ops import cpu_kernels
from megachat.ops.build import Recipe, load_library
from megachat.ops.token_logprobs import token_logprobs_backward, token_logprobs_forward
from tests.harness.pairwise import pairwise
from tests.ops.pages import attention, make_pages, score_rounding

DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Of a result, relative to the largest element."""
VARIANTS = {
    "this CPU": Recipe(),
    "plain": Recipe(flags=("-march=x86-64", "-O1")),
    "16 lanes": Recipe(flags=("-march=native", "-DMEGACHAT_LANES=16", "-O1")),
}
LENGTHS = [0, 1, 15, 16, 17, 129, 700]
HEAD_SIZES = (64, 80, 96, 128)


@pytest.fixture(autouse=True, params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every test with each way of building the kernels."""
    load = functools.partial(load_library, VARIANTS[request.param])
    monkeypatch.setattr(cpu_kernels, "load_library", load)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Work shared out over so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def _error(found: Tensor, expected: Tensor) -> float:
    scale = max(1.0, expected.abs().max().item())
    return (found.double() - expected).abs().max().item() / scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "block_size"), zip(HEAD_SIZES, (16, 32, 64, 128), strict=True)
)
def test_decode_is_exact_to_rounding_for_all_head_sizes_blocks_and_lengths(
    head_dim: int, block_size: int, dtype: torch.dtype, threads: None
) -> None:
    pages = make_pages(
        LENGTHS, block_size=block_size, heads=3, head_dim=head_dim, dtype=dtype, poison=torch.nan
    )
    generator = torch.Generator().manual_seed(head_dim)
    query = (torch.randn(len(LENGTHS), 3, head_dim, generator=generator) * 3).to(dtype)
    found = cpu_kernels.paged_attention_decode(
        query, pages.keys, pages.values, pages.tables, torch.tensor(LENGTHS)
    )
    assert not found[0].any()
    for row in range(1, len(LENGTHS)):
        new = query[row, None]
        expected = attention(new, *pages.whole[row], start=LENGTHS[row] - 1)[0]
        bound = ROUNDING[dtype] + score_rounding(new, *pages.whole[row])
        assert _error(found[row], expected) <= bound, LENGTHS[row]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "block_size"), zip(HEAD_SIZES, (128, 64, 32, 16), strict=True)
)
def test_prefill_is_exact_to_rounding_for_all_head_sizes_blocks_and_chunks(
    head_dim: int, block_size: int, dtype: torch.dtype, threads: None
) -> None:
    starts, counts = torch.tensor([0, 5, 130, 17, 0]), torch.tensor([66, 1, 7, 0, 4])
    lengths = (starts + counts).tolist()
    pages = make_pages(
        lengths, block_size=block_size, heads=2, head_dim=head_dim, dtype=dtype, poison=torch.nan
    )
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    generator = torch.Generator().manual_seed(head_dim)
    query = (torch.randn(int(offsets[-1]), 2, head_dim, generator=generator) * 3).to(dtype)
    found = cpu_kernels.paged_attention_prefill(
        query, pages.keys, pages.values, pages.tables, starts, offsets
    )
    for row, start in enumerate(starts.tolist()):
        part = slice(int(offsets[row]), int(offsets[row + 1]))
        if counts[row]:
            expected = attention(query[part], *pages.whole[row], start=start)
            bound = ROUNDING[dtype] + score_rounding(query[part], *pages.whole[row])
            assert _error(found[part], expected) <= bound, row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_in_a_key_reaches_the_row_that_attends_to_it_and_no_other(
    dtype: torch.dtype,
) -> None:
    pages = make_pages([40, 40], block_size=16, head_dim=64, dtype=dtype)
    pages.keys[pages.tables[0, 1], 3, 0, 5] = torch.nan
    query = torch.ones(2, 2, 64, dtype=dtype)
    found = cpu_kernels.paged_attention_decode(
        query, pages.keys, pages.values, pages.tables, torch.tensor([40, 40])
    )
    assert found[0, 0].isnan().all()
    assert not found[0, 1].isnan().any() and not found[1].isnan().any()


@pytest.mark.parametrize(
    ("tokens", "sizes", "dtype"),
    pairwise(
        [0, 1, 2, 3, 8, 11, 12, 21, 40, 70],
        [(1, 7, 1600), (3, 8, 37), (2, 1, 5), (1, 29, 64)],
        DTYPES,
    ),
    ids=str,
)
def test_products_are_exact_to_rounding_for_odd_sizes(
    tokens: int, sizes: tuple[int, int, int], dtype: torch.dtype, threads: None
) -> None:
    tiles, rows, width = sizes
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, tiles * width, generator=generator).to(dtype)
    # Rows of a wider matrix, as where a rank reads columns of its training shard.
    wide = torch.randn(tiles, rows, width + 3, generator=generator).to(dtype)
    weight = wide[..., 1 : width + 1]
    found = cpu_kernels.tiled_linear(x, weight)
    assert found.shape == (tokens, rows) and found.dtype is dtype
    if tokens:
        of_tiles = x.view(-1, tiles, width).double()
        expected = torch.einsum("mti,tni->mn", of_tiles, weight.double())
        absolute = torch.einsum("mti,tni->mn", of_tiles.abs(), weight.double().abs())
        assert _error(found, expected) <= ROUNDING[dtype] + absolute.max().item() * 2.0**-24


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("fewer", "more"), [(1, 5), (24, 70)])
def test_a_token_gets_the_same_bits_whatever_is_beside_it(
    fewer: int, more: int, dtype: torch.dtype, threads: None
) -> None:
    """Among few tokens, and among many: the two ways add up in different orders."""
    generator = torch.Generator().manual_seed(more)
    x = torch.randn(more, 800, generator=generator).to(dtype)
    weight = torch.randn(2, 40, 400, generator=generator).to(dtype)
    part = slice(more - fewer, more)
    found = cpu_kernels.tiled_linear(x[part].contiguous(), weight)
    assert torch.equal(found, cpu_kernels.tiled_linear(x, weight)[part])


def test_what_a_kernel_would_misread_is_refused() -> None:
    pages = make_pages([4, 4], block_size=2)
    query = torch.zeros(2, 2, 8)
    lengths = torch.tensor([4, 4])
    decode = cpu_kernels.paged_attention_decode
    with pytest.raises(KernelError, match=r"no CPU kernel for torch.float16"):
        decode(query.half(), pages.keys.half(), pages.values.half(), pages.tables, lengths)
    with pytest.raises(KernelError, match=r"needs contiguous torch.float32.*got torch.bfloat16"):
        decode(query, pages.keys.bfloat16(), pages.values, pages.tables, lengths)
    with pytest.raises(KernelError, match=r"needs contiguous torch.int64.*got torch.int32"):
        decode(query, pages.keys, pages.values, pages.tables, lengths.int())
    with pytest.raises(KernelError, match="needs int32 tables"):
        decode(query, pages.keys, pages.values, pages.tables.long(), lengths)
    with pytest.raises(KernelError, match="rows must be contiguous"):
        cpu_kernels.tiled_linear(torch.zeros(1, 4), torch.zeros(1, 4, 3).transpose(1, 2))
    with pytest.raises(KernelError, match="bfloat16 weight"):
        cpu_kernels.tiled_linear(torch.zeros(1, 4), torch.zeros(1, 3, 4).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 64, 1021, 2056])
def test_statistics_and_gradients_of_tokens_are_exact_to_rounding_for_all_widths(
    width: int, dtype: torch.dtype, threads: None
) -> None:
    """Rows with and without their target; a span of sums is 1024 columns long."""
    generator = torch.Generator().manual_seed(width)
    logits = (torch.randn(5, width, generator=generator) * 3).to(dtype)
    targets = torch.tensor([7, 7 + width - 1, 6, 7 + width, 7 + width // 2])
    arguments = (targets, 7, 0.7)
    found = cpu_kernels.token_logprobs_forward(logits, *arguments)
    expected = token_logprobs_forward.reference(logits.double(), *arguments)
    for mine, exact in zip(found, expected, strict=True):
        assert _error(mine, exact) <= 1e-6
    per_token = [torch.randn(5, generator=generator) for _ in range(4)]
    per_token[0] = (logits.float() / 0.7).logsumexp(1)
    found = cpu_kernels.token_logprobs_backward(logits, targets, *per_token, 7, 0.7)
    expected = token_logprobs_backward.reference(
        logits.double(), targets, *(number.double() for number in per_token), 7, 0.7
    )
    assert _error(found, expected) <= max(1e-6, ROUNDING[dtype])

"""The one place for cases of `paged_attention_prefill`: ragged chunks, some with a past."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.kernels.accuracy import FP32_ROUND_OFF, complaint_about
from tests.kernels.cases import FAR_OUTSIDE, Case
from tests.kernels.launch import FORMATS

FEWEST_KEYS = 16
"""Of a tile, whatever the format."""


@dataclass(frozen=True)
class PrefillCase(Case):
    """`paged_attention_prefill`."""

    out: Tensor
    exact: Tensor
    internal: Tensor

    def wrong_result(self) -> str:
        return complaint_about("out", self.out, self.exact, self.internal)


def prefill_case(
    dtype: torch.dtype,
    *,
    head_dim: int,
    block_size: int,
    chunks: Sequence[tuple[int, int]],
    heads: int = 2,
    size: float = 1.0,
) -> PrefillCase:
    """Sequences scattered over the cache; unused slots NaN, unused table entries far outside.

    Args:
        dtype: Of queries, cache and result.
        head_dim: Columns of a head.
        block_size: Tokens of a page.
        chunks: Of each sequence, the tokens before its chunk and those of the chunk.
        heads: Of the attention.
        size: Deviation of queries and keys.
    """
    generator = torch.Generator().manual_seed(head_dim * block_size + len(chunks))
    reaches = [start + length for start, length in chunks]
    columns = max(-(-reach // block_size) for reach in reaches) + 1
    blocks = len(chunks) * columns
    offsets = torch.tensor([0, *(length for _, length in chunks)]).cumsum(0)
    tokens = int(offsets[-1])
    query = (size * torch.randn(tokens, heads, head_dim, generator=generator)).to(dtype)
    keys = torch.full((blocks, block_size, heads, head_dim), torch.nan).to(dtype)
    values = keys.clone()
    pages = torch.randperm(blocks, generator=generator).view(len(chunks), columns)
    tables = torch.full((len(chunks), columns), FAR_OUTSIDE, dtype=torch.int32)
    exact = torch.zeros(tokens, heads, head_dim, dtype=torch.float64)
    internal = torch.zeros(tokens, heads, 1, dtype=torch.float64)
    for chunk, ((start, length), reach) in enumerate(zip(chunks, reaches, strict=True)):
        if not length:
            continue  # nobody reads its past
        used = -(-reach // block_size)
        tables[chunk, :used] = pages[chunk, :used]
        position = torch.arange(reach)
        place = (pages[chunk, position // block_size], position % block_size)
        for cache, deviation in ((keys, size), (values, 1.0)):
            drawn = torch.randn(reach, heads, head_dim, generator=generator)
            cache[place] = (deviation * drawn).to(dtype)
        part = slice(int(offsets[chunk]), int(offsets[chunk + 1]))
        exact[part], internal[part] = _attention(query[part], keys[place], values[place], start)
    out = torch.full_like(query, torch.nan)
    starts = torch.tensor([start for start, _ in chunks])
    return PrefillCase(
        kernel="paged_attention_prefill",
        arguments=(
            *(FORMATS[dtype], query, keys, values, tables, starts, offsets, out),
            *(tokens, len(chunks), heads, head_dim, block_size, columns, None),
        ),
        out=out,
        exact=exact,
        internal=internal,
    )


def _attention(query: Tensor, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """float64 causal attention of `[queries, heads, d]`, and a bound on what fp32 adds.

    A thread adds the products of a score one after the other: d products, d additions and the
    scale, each wrong by a round-off of at most the sum of absolute products; the subtraction of
    the maximum adds two. The exponential turns that into a relative error of its weight, to which
    its own few roundings come. Weights, and values times weights, are added one token after the
    other, and rescaled at each tile of keys by a factor that is wrong by three round-offs and
    those of the maxima's difference, which are counted with the scores. The result is a mean of
    values, so its error is that relative error times a mean of absolute values, twice: above and
    below the fraction.
    """
    head_dim = query.shape[2]
    scale = head_dim**-0.5
    scores = torch.einsum("qhd,thd->hqt", query.double(), keys.double()) * scale
    products = torch.einsum("qhd,thd->hqt", query.double().abs(), keys.double().abs()) * scale
    visible = torch.arange(len(keys)) <= start + torch.arange(len(query))[:, None]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(2)
    exact = torch.einsum("hqt,thd->qhd", weights, values.double())
    spread = torch.einsum("hqt,thd->qhd", weights, values.double().abs()).amax(2, keepdim=True)
    in_score = (2 * head_dim + 5) * products.masked_fill(~visible, 0.0).amax(2).T
    seen = visible.sum(1, keepdim=True)
    in_sums = seen + 4 * (seen // FEWEST_KEYS + 1) + 8
    return exact, 2 * FP32_ROUND_OFF * (in_score + in_sums)[..., None] * spread

"""The one place for attention over a paged key-value cache: writing pages, reading them.

One layer's cache is a pair of tensors `[blocks, block_size, heads/tp, head_dim]`. A sequence owns a
row of a block table: its token at position p lies in block `table[p // block_size]` at offset
`p % block_size`. Tokens of many sequences travel packed, without padding.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from megachat.ops import cpu_kernels, cuda_kernels
from megachat.ops.registry import Backend, CudaKernel, Op, register

GATHER_ELEMENTS = 1 << 20
"""Keys that the reference copies out of their pages at once, so that the copy stays in a cache."""

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def _append(qkv: Tensor, bias: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """Adds the bias, stores keys and values, returns the queries.

    Args:
        qkv: `[tokens, 3 x hidden/tp]`, columns by head, and within a head query, key, value.
        bias: `[3 x hidden/tp]`.
        keys: `[blocks, block_size, heads/tp, head_dim]`, written.
        values: As `keys`, written.
        slots: `[tokens]` int64, `block x block_size + offset` of each token.

    Returns:
        `[tokens, heads/tp, head_dim]` queries.
    """
    heads, head_dim = keys.shape[2:]
    by_head = (qkv + bias).view(-1, heads, 3, head_dim)
    keys.flatten(0, 1).index_copy_(0, slots, by_head[:, :, 1])
    values.flatten(0, 1).index_copy_(0, slots, by_head[:, :, 2])
    return by_head[:, :, 0]


def _decode(query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one new token of each sequence to all its tokens.

    Args:
        query: `[rows, heads/tp, head_dim]`.
        keys: `[blocks, block_size, heads/tp, head_dim]`.
        values: As `keys`.
        tables: `[rows, columns]` int32; entries beyond a row's length may be any valid block.
        lengths: `[rows]` int64 tokens to attend to, the new one included; 0 gives zeros.

    Returns:
        `[rows, heads/tp, head_dim]`.
    """
    reach = tables.shape[1] * keys.shape[1]
    visible = torch.arange(reach, device=query.device) < lengths[:, None]
    step = max(1, GATHER_ELEMENTS // max(1, reach * query.shape[1] * query.shape[2]))
    parts = []
    for start in range(0, len(query), step):
        rows = slice(start, start + step)
        parts.append(
            F.scaled_dot_product_attention(
                query[rows, :, None],
                _pages(keys, tables[rows]),
                _pages(values, tables[rows]),
                attn_mask=visible[rows, None, None],
            )
        )
    mixed = torch.cat(parts).squeeze(2) if parts else query.clone()
    return mixed.masked_fill(lengths[:, None, None] == 0, 0.0)


def _prefill(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, starts: Tensor, offsets: Tensor
) -> Tensor:
    """Causal attention of a chunk of each sequence to the chunk and all that precedes it.

    Args:
        query: `[tokens, heads/tp, head_dim]`, the chunks one after the other.
        keys: `[blocks, block_size, heads/tp, head_dim]`, which hold the chunks already.
        values: As `keys`.
        tables: `[chunks, columns]` int32.
        starts: `[chunks]` int64, tokens of each sequence before its chunk.
        offsets: `[chunks + 1]` int64, where each chunk starts in `query`, and the end.

    Returns:
        `[tokens, heads/tp, head_dim]`.
    """
    out = torch.empty_like(query)
    lengths = offsets.diff()
    # Chunks of similar length go together, so that padding them costs at most a factor of two.
    sizes = torch.frexp(lengths.clamp(min=1).double() - 0.5).exponent
    for size in sorted(set(sizes.tolist())):
        chunks = (sizes == size).nonzero().squeeze(1)
        _prefill_padded(query, out, (keys, values), tables[chunks], starts[chunks], offsets, chunks)
    return out


def _prefill_padded(
    query: Tensor,
    out: Tensor,
    cache: tuple[Tensor, Tensor],
    tables: Tensor,
    starts: Tensor,
    offsets: Tensor,
    chunks: Tensor,
) -> None:
    """Attends for some chunks, padded to the longest of them, and writes their part of `out`."""
    keys, values = cache
    block_size = keys.shape[1]
    first, lengths = offsets[chunks], offsets[chunks + 1] - offsets[chunks]
    widest, reach = int(lengths.max()), int((starts + lengths).max())
    columns = -(-reach // block_size)
    inside = torch.arange(widest, device=query.device)[None]
    real = inside < lengths[:, None]
    tokens = (first[:, None] + inside).masked_fill(~real, 0)
    positions = starts[:, None] + inside
    visible = torch.arange(columns * block_size, device=query.device) <= positions[..., None]
    tables = tables[:, :columns]
    mixed = F.scaled_dot_product_attention(
        query[tokens].transpose(1, 2),
        _pages(keys, tables),
        _pages(values, tables),
        attn_mask=visible[:, None],
    )
    out[tokens[real]] = mixed.transpose(1, 2)[real]


def _pages(cache: Tensor, tables: Tensor) -> Tensor:
    """`[rows, heads/tp, columns x block_size, head_dim]`: a copy of each row's pages in order."""
    rows, columns = tables.shape
    _, block_size, heads, head_dim = cache.shape
    pages = cache.index_select(0, tables.flatten())
    return pages.view(rows, columns * block_size, heads, head_dim).transpose(1, 2)


kv_append = register(
    Op(
        name="kv_append",
        schema=(
            "(Tensor qkv, Tensor bias, Tensor(a!) keys, Tensor(b!) values, Tensor slots) -> Tensor"
        ),
        reference=_append,
        tolerance=_TOLERANCE,
        backends={Backend.CPU: cpu_kernels.kv_append},
        cuda=CudaKernel(launch=cuda_kernels.kv_append, fake=cuda_kernels.new_queries),
    )
)
"""QKV bias, scatter of keys and values into their pages."""

paged_attention_decode = register(
    Op(
        name="paged_attention_decode",
        schema=(
            "(Tensor query, Tensor keys, Tensor values, Tensor tables, Tensor lengths) -> Tensor"
        ),
        reference=_decode,
        tolerance=_TOLERANCE,
        backends={Backend.CPU: cpu_kernels.paged_attention_decode},
        cuda=CudaKernel(
            launch=cuda_kernels.paged_attention_decode,
            fake=lambda query, *_: torch.empty_like(query),
        ),
    )
)
"""One query token per row against its pages."""

paged_attention_prefill = register(
    Op(
        name="paged_attention_prefill",
        schema=(
            "(Tensor query, Tensor keys, Tensor values, Tensor tables, Tensor starts, "
            "Tensor offsets) -> Tensor"
        ),
        reference=_prefill,
        tolerance=_TOLERANCE,
        backends={Backend.CPU: cpu_kernels.paged_attention_prefill},
        cuda=CudaKernel(
            launch=cuda_kernels.paged_attention_prefill,
            fake=lambda query, *_: torch.empty_like(query),
        ),
    )
)
"""Ragged chunks of query tokens, causal, against their pages."""

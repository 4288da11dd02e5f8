"""The one place that runs the model for generation, one packed step at a time.

A step holds the newest token of every running sequence and chunks of prompts, one token after the
other without padding. The weights are those of training, as views; keys and values live in pages.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megachat.generation.kv_cache import PagedKvCache
from megachat.generation.weights import GenerationLayer, GenerationWeights
from megachat.model.config import POSITION_OFFSET
from megachat.ops.paged_cache import kv_append, paged_attention_decode, paged_attention_prefill
from megachat.ops.registry import Backend
from megachat.ops.tiled_linear import tiled_linear
from megachat.parallel.collectives import all_reduce_sum

_LAYER_NORM_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeRows:
    """The sequences that get one token computed."""

    tables: Tensor
    """[rows, columns] int32."""
    lengths: Tensor
    """[rows] int64 tokens to attend to, the new one included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillRows:
    """The sequences that get a chunk of tokens computed."""

    tables: Tensor
    """[chunks, columns] int32."""
    starts: Tensor
    """[chunks] int64 tokens before the chunk."""
    offsets: Tensor
    """[chunks + 1] int64, where each chunk starts among the tokens of all chunks, and the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedStep:
    """One forward pass: first the decode rows' tokens, then the chunks'."""

    tokens: Tensor
    """[tokens] int64."""
    positions: Tensor
    """[tokens] int64, within each token's sequence."""
    slots: Tensor
    """[tokens] int64, where the cache keeps each token; see `PagedKvCache.positions_of`."""
    decode: DecodeRows | None
    prefill: PrefillRows | None
    outputs: Tensor | None
    """[outputs] int64, the tokens whose logits are wanted; None means all."""


class ModelRunner:
    """Computes next-token logits with a generation shard's weights and a paged cache.

    A step without chunks depends on the host only through its shapes: tables, lengths and positions
    are tensors. So one recorded graph per batch size can replay it at every position.
    """

    def __init__(
        self, weights: GenerationWeights, cache: PagedKvCache, *, backend: Backend
    ) -> None:
        """Picks the implementations; copies nothing.

        Args:
            weights: What to compute with.
            cache: Where keys and values live.
            backend: Who computes the operations of the registry.

        Raises:
            KernelError: The backend lacks one of them.
        """
        self._weights = weights
        self._cache = cache
        self._group = weights.groups.tensor
        self._norm_first = weights.config.layer_norm_first
        self._append = kv_append.on(backend)
        self._attend_decode = paged_attention_decode.on(backend)
        self._attend_prefill = paged_attention_prefill.on(backend)
        self._tiled_linear = tiled_linear.on(backend)

    @torch.no_grad()
    def forward(self, step: PackedStep) -> Tensor:
        """Runs one step; its keys and values are in the cache afterwards.

        Returns:
            `[outputs, padded_vocab/tp]` logits of this rank's slice of the vocabulary; padding
            columns hold the dtype's lowest number.
        """
        hidden = self._embed(step.tokens, step.positions)
        for number, layer in enumerate(self._weights.layers):
            hidden = self._layer(hidden, number, layer, step)
        return self._logits(hidden if step.outputs is None else hidden[step.outputs])

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """`[tokens]` ids to `[tokens, hidden]`."""
        weights = self._weights
        local = tokens - weights.vocab_start
        outside = (local < 0) | (local >= weights.words.shape[0])
        hidden = F.embedding(local.masked_fill(outside, 0), weights.words)
        hidden = all_reduce_sum(hidden.masked_fill(outside[:, None], 0.0), self._group)
        if weights.project_in is not None:
            hidden = F.linear(hidden, weights.project_in)
        return hidden + F.embedding(positions + POSITION_OFFSET, weights.positions)

    def _layer(
        self, hidden: Tensor, number: int, layer: GenerationLayer, step: PackedStep
    ) -> Tensor:
        """One transformer layer, pre-LN or post-LN, `[tokens, hidden]` both ways."""
        norm1 = (layer.norm1_weight, layer.norm1_bias)
        norm2 = (layer.norm2_weight, layer.norm2_bias)
        before = self._norm(hidden, *norm1) if self._norm_first else hidden
        attended = self._attention(before, number, layer, step)
        hidden = hidden + attended
        if not self._norm_first:
            hidden = self._norm(hidden, *norm1)
        before = self._norm(hidden, *norm2) if self._norm_first else hidden
        inner = F.linear(before, layer.fc1_weight, layer.fc1_bias).relu_()
        hidden = hidden + self._row_parallel(inner, layer.fc2_weight, layer.fc2_bias)
        return hidden if self._norm_first else self._norm(hidden, *norm2)

    def _attention(
        self, hidden: Tensor, number: int, layer: GenerationLayer, step: PackedStep
    ) -> Tensor:
        """Projects to heads, attends over the pages, projects back."""
        keys, values = self._cache.layer(number)
        qkv = F.linear(hidden, layer.qkv_weight)
        query = self._append(qkv, layer.qkv_bias, keys, values, step.slots)
        parts, num_rows = [], 0
        if step.decode is not None:
            rows = step.decode
            num_rows = len(rows.lengths)
            parts.append(
                self._attend_decode(query[:num_rows], keys, values, rows.tables, rows.lengths)
            )
        if step.prefill is not None:
            chunks = step.prefill
            parts.append(
                self._attend_prefill(
                    query[num_rows:], keys, values, chunks.tables, chunks.starts, chunks.offsets
                )
            )
        mixed = (torch.cat(parts) if len(parts) > 1 else parts[0]).flatten(1)
        return self._row_parallel(mixed, layer.proj_weight, layer.proj_bias)

    def _row_parallel(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A product whose input dimension is cut over the tensor group; the bias is added once."""
        return all_reduce_sum(self._tiled_linear(x, weight), self._group) + bias

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, _LAYER_NORM_EPSILON)

    def _logits(self, hidden: Tensor) -> Tensor:
        """`[outputs, hidden]` to `[outputs, padded_vocab/tp]`."""
        weights = self._weights
        if weights.final_norm_weight is not None and weights.final_norm_bias is not None:
            hidden = self._norm(hidden, weights.final_norm_weight, weights.final_norm_bias)
        if weights.project_out is not None:
            hidden = F.linear(hidden, weights.project_out)
        logits = F.linear(hidden, weights.words)
        logits[:, weights.local_vocab :] = torch.finfo(logits.dtype).min
        return logits

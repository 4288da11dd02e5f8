"""The one place that runs the model for generation, one packed step at a time.

A step holds the newest token of every running sequence and chunks of prompts, one token after the
other without padding. The weights are those of training, as views; keys and values live in pages.
"""

from dataclasses import fields

import torch
from torch import Tensor
from torch.nn import functional as F

from megachat.generation.graphs import DecodeGraphs, StepRecorder
from megachat.generation.kv_cache import PagedKvCache
from megachat.generation.packed import PackedStep
from megachat.generation.weights import GenerationLayer, GenerationWeights
from megachat.model.config import POSITION_OFFSET
from megachat.ops.all_reduce import GroupSum
from megachat.ops.backends import prepare
from megachat.ops.decode_step import CpuDecodeStep, DecodeLayer, DecodeModel
from megachat.ops.epilogues import bias_residual_layer_norm
from megachat.ops.paged_cache import kv_append, paged_attention_decode, paged_attention_prefill
from megachat.ops.registry import Backend
from megachat.ops.tiled_linear import tiled_linear, tiled_linear_bias_relu
from megachat.parallel.lifetime import Owner

_EPSILON = 1e-5


class ModelRunner(Owner):
    """Computes next-token logits with a generation shard's weights and a paged cache.

    A step without chunks depends on the host only through its shapes: tables, lengths and positions
    are tensors. So a recorded step can be replayed at every position; see `DecodeGraphs`.
    """

    def __init__(
        self,
        weights: GenerationWeights,
        cache: PagedKvCache,
        *,
        backend: Backend,
        add_up: GroupSum,
        recorder: StepRecorder | None = None,
    ) -> None:
        """Picks the implementations; copies nothing.

        Args:
            weights: What to compute with.
            cache: Where keys and values live.
            backend: Who computes the operations of the registry.
            add_up: Sums over the tensor group, as `group_sum` finds for the backend.
            recorder: Records steps without chunks, for as long as weights and cache keep their
                addresses; None computes every step anew.

        Raises:
            KernelError: The backend lacks one of them, or cannot be built here.
        """
        prepare(backend, weights.words.device)
        self._weights = weights
        self._cache = cache
        self._add_up = add_up
        self._norm_first = weights.config.layer_norm_first
        self._append = kv_append.on(backend)
        self._attend_decode = paged_attention_decode.on(backend)
        self._attend_prefill = paged_attention_prefill.on(backend)
        self._tiled_linear = tiled_linear.on(backend)
        self._linear_bias_relu = tiled_linear_bias_relu.on(backend)
        self._add_and_norm = bias_residual_layer_norm.on(backend)
        self._graphs: DecodeGraphs | None = None
        if recorder is not None:
            columns = cache.tables.shape[1]
            self._graphs = DecodeGraphs(self._forward, recorder=recorder, columns=columns)
        self._decode_step: CpuDecodeStep | None = None
        if backend is Backend.CPU:
            is_cut = weights.groups.tensor.size() > 1
            model = decode_model(weights, cache, add_up if is_cut else None)
            self._decode_step = CpuDecodeStep(model, most_rows=cache.max_sequences)

    @torch.no_grad()
    def forward(self, step: PackedStep) -> Tensor:
        """Runs one step; its keys and values are in the cache afterwards.

        Returns:
            `[outputs, padded_vocab/tp]` logits of this rank's slice of the vocabulary; padding
            columns hold the dtype's lowest number. They may be overwritten by the next step.

        Raises:
            PhaseError: The runner was closed.
        """
        self.check_open()
        rows = step.decode
        if rows is None or step.prefill is not None:
            return self._forward(step)
        if self._graphs is not None:
            return self._graphs.logits(step)
        fused = self._decode_step
        if fused is None or step.outputs is not None or len(step.tokens) > fused.most_rows:
            return self._forward(step)
        return fused.run(
            step.tokens,
            positions=step.positions,
            slots=step.slots,
            tables=rows.tables,
            lengths=rows.lengths,
        )

    def _end(self) -> None:
        """Ends the recorded steps and lets go of every address that steps compute with."""
        if self._graphs is not None:
            self._graphs.close()
        self._graphs = self._decode_step = None
        del self._weights, self._cache, self._add_up

    def _forward(self, step: PackedStep) -> Tensor:
        """Computes a step, operation by operation."""
        layers = self._weights.layers
        hidden = self._embed(step.tokens, step.positions)
        normed = hidden
        if self._norm_first:
            first = layers[0]
            normed = F.layer_norm(
                hidden, hidden.shape[-1:], first.norm1_weight, first.norm1_bias, _EPSILON
            )
        for number in range(len(layers)):
            hidden, normed = self._layer(hidden, normed, number, step)
        return self._logits(normed if step.outputs is None else normed[step.outputs])

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """`[tokens]` ids to `[tokens, hidden]`."""
        weights = self._weights
        local = tokens - weights.vocab_start
        outside = (local < 0) | (local >= weights.words.shape[0])
        hidden = F.embedding(local.masked_fill(outside, 0), weights.words)
        hidden = self._add_up(hidden.masked_fill(outside[:, None], 0.0))
        if weights.project_in is not None:
            hidden = self._linear(hidden, weights.project_in)
        return hidden + F.embedding(positions + POSITION_OFFSET, weights.positions)

    def _layer(
        self, hidden: Tensor, normed: Tensor, number: int, step: PackedStep
    ) -> tuple[Tensor, Tensor]:
        """One transformer layer, pre-LN or post-LN.

        Args:
            hidden: `[tokens, hidden]`, what the layer adds to.
            normed: `[tokens, hidden]`, what its attention reads: `hidden`, normalised in pre-LN.
            number: Of the layer.
            step: What is computed.

        Returns:
            The same two of the next layer; after the last one, `normed` is what the output
            embedding reads. In post-LN both are one.
        """
        layer = self._weights.layers[number]
        attended = self._attention(normed, number, layer, step)
        # The norm after attention is the second one in pre-LN order, and the first one in post-LN.
        norm = (
            (layer.norm2_weight, layer.norm2_bias)
            if self._norm_first
            else (layer.norm1_weight, layer.norm1_bias)
        )
        hidden, normed = self._add(attended, layer.proj_bias, hidden, norm)
        inner = self._linear_bias_relu(normed, layer.fc1_weight[None], layer.fc1_bias)
        out = self._row_parallel(inner, layer.fc2_weight)
        return self._add(out, layer.fc2_bias, hidden, self._norm_after(number))

    def _norm_after(self, number: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the LayerNorm that follows a layer's feed-forward block."""
        weights = self._weights
        if not self._norm_first:
            layer = weights.layers[number]
            return layer.norm2_weight, layer.norm2_bias
        if number + 1 < len(weights.layers):
            layer = weights.layers[number + 1]
            return layer.norm1_weight, layer.norm1_bias
        weight, bias = weights.final_norm_weight, weights.final_norm_bias
        assert weight is not None and bias is not None, "a pre-LN model ends in a norm"
        return weight, bias

    def _add(
        self, x: Tensor, bias: Tensor, residual: Tensor, norm: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The next `hidden` and `normed` from a block's output."""
        total, normed = self._add_and_norm(x, bias, residual, *norm, _EPSILON)
        return (total if self._norm_first else normed), normed

    def _attention(
        self, hidden: Tensor, number: int, layer: GenerationLayer, step: PackedStep
    ) -> Tensor:
        """Projects to heads, attends over the pages, projects back."""
        keys, values = self._cache.layer(number)
        qkv = self._linear(hidden, layer.qkv_weight)
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
        return self._row_parallel(mixed, layer.proj_weight)

    def _row_parallel(self, x: Tensor, weight: Tensor) -> Tensor:
        """A product whose input dimension is cut over the tensor group, without its bias."""
        return self._add_up(self._tiled_linear(x, weight))

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """A product with a weight `[out, in]`: one tile."""
        return self._tiled_linear(x, weight[None])

    def _logits(self, hidden: Tensor) -> Tensor:
        """`[outputs, hidden]`, normalised, to `[outputs, padded_vocab/tp]`."""
        weights = self._weights
        if weights.project_out is not None:
            hidden = self._linear(hidden, weights.project_out)
        logits = self._linear(hidden, weights.words)
        logits[:, weights.local_vocab :].fill_(torch.finfo(logits.dtype).min)
        return logits


def decode_model(
    weights: GenerationWeights, cache: PagedKvCache, add_up: GroupSum | None
) -> DecodeModel:
    """What `CpuDecodeStep` takes; `add_up` sums over the tensor group, None where one is alone."""
    layers = []
    for number, layer in enumerate(weights.layers):
        keys, values = cache.layer(number)
        tensors = {field.name: getattr(layer, field.name) for field in fields(layer)}
        layers.append(DecodeLayer(**tensors, keys=keys, values=values))
    return DecodeModel(
        layers=tuple(layers),
        words=weights.words,
        positions=weights.positions,
        position_offset=POSITION_OFFSET,
        project_in=weights.project_in,
        project_out=weights.project_out,
        final_norm_weight=weights.final_norm_weight,
        final_norm_bias=weights.final_norm_bias,
        norm_first=weights.config.layer_norm_first,
        epsilon=_EPSILON,
        vocab_start=weights.vocab_start,
        local_vocab=weights.local_vocab,
        group_sum=add_up,
    )

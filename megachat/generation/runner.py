"""The one place that runs the model for generation: prefill and decode over a contiguous cache.

The same weights as in training, as views, without autograd and without megatron's module tree.
Rows are right-padded and their lengths explicit: position p of a row always holds its p-th token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megachat.errors import CapacityError, LayoutError
from megachat.model.config import POSITION_OFFSET
from megachat.model.opt import LayerWeights, OptModel
from megachat.parallel.collectives import all_gather_last_dim, all_reduce_sum

_LAYER_NORM_EPSILON = 1e-5

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key and value of the new tokens, `[rows, heads/tp, new, head_dim]`, to attended values."""


@dataclass(slots=True)
class DecodeState:
    """The cache of a batch of requests."""

    keys: list[Tensor]
    """Per layer `[rows, heads/tp, capacity, head_dim]`."""
    values: list[Tensor]
    """Per layer `[rows, heads/tp, capacity, head_dim]`."""
    lengths: Tensor
    """[rows] int64, tokens of each row that are in the cache."""

    def select(self, rows: Tensor) -> "DecodeState":
        """The cache of some of the rows."""
        return DecodeState(
            keys=[keys[rows] for keys in self.keys],
            values=[values[rows] for values in self.values],
            lengths=self.lengths[rows],
        )


class ModelRunner:
    """Computes next-token logits for batches of requests with the weights of an `OptModel`."""

    def __init__(self, model: OptModel) -> None:
        """Wraps the model, whose parameters it reads in every call.

        Raises:
            LayoutError: The model is cut into pipeline stages.
        """
        layout = model.groups.layout
        if layout.pipeline > 1:
            raise LayoutError(
                f"generation needs whole models, but layout {layout} cuts the actor into "
                f"{layout.pipeline} pipeline stages: use pipeline degree 1"
            )
        embedding, output = model.embedding_weights(), model.output_weights()
        assert embedding is not None and output is not None, "one stage holds everything"
        assert output.words is not None, "generation needs a language-model head"
        self._config = model.config
        self._group = model.groups.tensor
        self._heads = model.config.heads // layout.tensor
        self._layers = model.layer_weights()
        self._embedding = embedding
        self._output = output
        self._words = output.words
        self._first_word = model.groups.coordinate.tensor * self._words.shape[0]

    @torch.no_grad()
    def prefill(
        self, tokens: Tensor, lengths: Tensor, *, capacity: int
    ) -> tuple[DecodeState, Tensor]:
        """Runs whole prompts.

        Args:
            tokens: `[rows, prompt_len]` int64, right-padded.
            lengths: `[rows]` int64, at least 1.
            capacity: Positions to reserve for each row.

        Returns:
            The filled cache and the `[rows, vocab]` logits after each prompt's last token.

        Raises:
            CapacityError: A row could outgrow the model's positions.
        """
        if capacity > self._config.max_positions:
            raise CapacityError(
                f"prompt and response need {capacity} positions, the model has "
                f"{self._config.max_positions}: shorten prompts or lower max_new_tokens"
            )
        rows, prompt_len = tokens.shape
        shape = (rows, self._heads, capacity, self._config.head_dim)
        state = DecodeState(keys=[], values=[], lengths=lengths)
        positions = torch.arange(prompt_len, device=tokens.device)[None]
        hidden = self._embed(tokens, positions)
        for weights in self._layers:

            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                keys, values = key.new_zeros(shape), value.new_zeros(shape)
                keys[:, :, :prompt_len], values[:, :, :prompt_len] = key, value
                state.keys.append(keys)
                state.values.append(values)
                return F.scaled_dot_product_attention(query, key, value, is_causal=True)

            hidden = self._layer(hidden, weights, attend)
        last = hidden.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[2]))
        return state, self._logits(last.squeeze(1))

    @torch.no_grad()
    def decode(self, state: DecodeState, tokens: Tensor) -> Tensor:
        """Appends one token to every row.

        Args:
            state: The cache; advanced by one position.
            tokens: `[rows]` int64.

        Returns:
            `[rows, vocab]` logits of the token after.
        """
        positions = state.lengths
        hidden = self._embed(tokens[:, None], positions[:, None])
        reach = int(positions.max()) + 1
        visible = torch.arange(reach, device=tokens.device)[None] <= positions[:, None]
        index = positions[:, None, None, None]
        for number, weights in enumerate(self._layers):
            keys, values = state.keys[number], state.values[number]

            def attend(
                query: Tensor,
                key: Tensor,
                value: Tensor,
                keys: Tensor = keys,
                values: Tensor = values,
            ) -> Tensor:
                target = index.expand_as(key)
                keys.scatter_(2, target, key)
                values.scatter_(2, target, value)
                return F.scaled_dot_product_attention(
                    query,
                    keys[:, :, :reach],
                    values[:, :, :reach],
                    attn_mask=visible[:, None, None],
                )

            hidden = self._layer(hidden, weights, attend)
        state.lengths = positions + 1
        return self._logits(hidden.squeeze(1))

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """`[rows, new]` tokens at `[rows or 1, new]` positions to `[rows, new, hidden]`."""
        local = tokens - self._first_word
        outside = (local < 0) | (local >= self._words.shape[0])
        hidden = F.embedding(local.masked_fill(outside, 0), self._words)
        hidden = all_reduce_sum(hidden.masked_fill(outside[..., None], 0.0), self._group)
        if self._embedding.project_in is not None:
            hidden = F.linear(hidden, self._embedding.project_in)
        return hidden + F.embedding(positions + POSITION_OFFSET, self._embedding.positions)

    def _layer(self, hidden: Tensor, weights: LayerWeights, attend: Attend) -> Tensor:
        """One transformer layer, pre-LN or post-LN, `[rows, new, hidden]` both ways."""
        norm_first = self._config.layer_norm_first
        norm1 = (weights.norm1_weight, weights.norm1_bias)
        norm2 = (weights.norm2_weight, weights.norm2_bias)
        attended = self._attention(
            self._norm(hidden, *norm1) if norm_first else hidden, weights, attend
        )
        hidden = hidden + attended if norm_first else self._norm(hidden + attended, *norm1)
        inner = F.linear(
            self._norm(hidden, *norm2) if norm_first else hidden,
            weights.fc1_weight,
            weights.fc1_bias,
        )
        outer = self._row_parallel(inner.relu(), weights.fc2_weight, weights.fc2_bias)
        return hidden + outer if norm_first else self._norm(hidden + outer, *norm2)

    def _attention(self, hidden: Tensor, weights: LayerWeights, attend: Attend) -> Tensor:
        """Projects to heads, attends, projects back."""
        rows, new, _ = hidden.shape
        qkv = F.linear(hidden, weights.qkv_weight, weights.qkv_bias)
        by_head = qkv.view(rows, new, self._heads, 3, self._config.head_dim).permute(3, 0, 2, 1, 4)
        mixed = attend(by_head[0], by_head[1], by_head[2])
        flat = mixed.transpose(1, 2).reshape(rows, new, self._heads * self._config.head_dim)
        return self._row_parallel(flat, weights.proj_weight, weights.proj_bias)

    def _row_parallel(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A product whose input dimension is cut over the tensor group; the bias is added once."""
        return all_reduce_sum(F.linear(x, weight), self._group) + bias

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, _LAYER_NORM_EPSILON)

    def _logits(self, hidden: Tensor) -> Tensor:
        """`[rows, hidden]` to `[rows, vocab]`, padding columns cut off."""
        output = self._output
        if output.norm_weight is not None and output.norm_bias is not None:
            hidden = self._norm(hidden, output.norm_weight, output.norm_bias)
        if output.project_out is not None:
            hidden = F.linear(hidden, output.project_out)
        logits = all_gather_last_dim(F.linear(hidden, self._words), self._group)
        return logits[:, : self._config.vocab_size]

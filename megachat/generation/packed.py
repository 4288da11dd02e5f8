"""The one place for what one forward pass of generation computes: `PackedStep`.

Tokens of many sequences lie one after the other without padding: first the newest token of every
running sequence, then chunks of prompts.
"""

from dataclasses import dataclass

from torch import Tensor


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
